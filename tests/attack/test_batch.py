"""Batches under attack: names, links, descriptors, deep JSON, tight limits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emlocal.batch.keys import Keys, Places
from emlocal.batch.output import manifest_path
from emlocal.errors import EmlocalError, UsageError, explained
from tests.batch.batches import batch, rows
from tests.batch.writer import opened, row
from tests.batch.writer import run as run_rows
from tests.tiny_gguf import write_tiny_gguf


def name_of(prompt: str) -> str:
    """Returns the name that a line with this content gets."""
    (only,) = rows([{"prompt": prompt}])
    return str(only["custom_id"])


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1)])
def test_a_given_name_that_is_the_hash_of_the_content(order: tuple[int, ...]) -> None:
    """Each line has its row, whichever comes first, and a second run finds both."""
    own = name_of("hello")
    lines = [{"prompt": "hello"}, {"custom_id": own, "prompt": "hello"}, {"prompt": "after"}]
    asked = [lines[i] for i in order]
    found = rows(asked)
    assert len({row["key"] for row in found}) == 3
    assert not any("error" in row for row in found)
    with Keys() as done:
        for row in found:
            done.add(row["key"])
        again = batch(asked, done=done)
        assert list(again.rows()) == []
        assert again.tally.skipped == 3


def test_the_second_of_one_given_name_is_still_an_error() -> None:
    own = name_of("hello")
    named = {"custom_id": own, "prompt": "hello"}
    found = rows([{"prompt": "hello"}, named, named, {"prompt": "hello"}])
    assert len({row["key"] for row in found}) == 4
    assert sum("error" in row for row in found) == 1


def test_keys_are_those_of_earlier_versions() -> None:
    """The keys are recorded from version 863f4ab, so that an output it began can be resumed."""
    lines = [
        {"prompt": "hello"},
        {"custom_id": "a", "prompt": "hello"},
        {"prompt": "hello"},
        {"custom_id": "a", "prompt": "x"},
    ]
    assert {row["key"] for row in rows(lines)} == RECORDED


RECORDED = {
    "d227543a67e4b6e351b0d64a1465a2fc",
    "d8dc5fba1b3e8af241841761a55d9a37",
    "e56c6f756250129a653863db0cc8c6eb",
    "f606327910593e91a3f63f06a682e224",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf"))


def run(model: str, folder: Path, *arguments: str, shell: str = "", first: str = "", **options: Any) -> Any:
    """Runs `emlocal ARGUMENTS`; a shell runs `first` before it and adds redirections."""
    environment = {
        **os.environ,
        **{f"EMLOCAL_{kind}_DIR": str(folder) for kind in ("CACHE", "CONFIG", "DATA")},
    }
    command = [
        sys.executable,
        "-m",
        "emlocal",
        arguments[0],
        "-m",
        model,
        "--max-tokens",
        "2",
        *arguments[1:],
    ]
    if shell:
        command = ["sh", "-c", f'{first} "$@" {shell}', "sh", *command]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=environment,
        cwd=folder,
        **options,
    )


def written(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def lines_to(path: Path, *values: Any) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def test_a_file_joined_with_one_made_from_an_earlier_output(model: str, tmp_path: Path) -> None:
    first = lines_to(tmp_path / "a.jsonl", {"prompt": "hello"})
    assert run(model, tmp_path, "batch", first, "-o", "a.out", "--parallel", "1").returncode == 0
    own = written(tmp_path / "a.out")[0]["custom_id"]
    joined = lines_to(
        tmp_path / "b.jsonl", {"prompt": "hello"}, {"custom_id": own, "prompt": "hello"}, {"prompt": "after"}
    )
    for _ in range(2):
        done = run(model, tmp_path, "batch", joined, "-o", "b.out", "--parallel", "1")
        assert done.returncode == 0, done.stderr
        assert len(written(tmp_path / "b.out")) == 3
    assert (
        run(model, tmp_path, "batch", joined, "-o", "a.out", "--parallel", "1").returncode == 0
    )  # the run began with the first line alone
    assert len(written(tmp_path / "a.out")) == 3


CLOSED = ["<&-", ">&-", "2>&-", "<&- 2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"]
QUICK = [
    ("batch", "2>&-"),
    ("batch", CLOSED[-1]),
    ("generate", ">&-"),
    ("generate", CLOSED[-1]),
    ("chat", "<&-"),
]
SLOW = [
    pytest.param(command, closed, marks=pytest.mark.attack)
    for command in ("batch", "generate", "chat")
    for closed in CLOSED
    if (command, closed) not in QUICK
]


@pytest.mark.parametrize(("command", "closed"), [*QUICK, *SLOW])
def test_closed_descriptors(model: str, tmp_path: Path, command: str, closed: str) -> None:
    lines = lines_to(tmp_path / "a.jsonl", *({"prompt": f"say {i}"} for i in range(3)))
    more = {"batch": [lines, "-o", "out", "--parallel", "1"], "generate": ["hi"], "chat": []}[command]
    done = run(model, tmp_path, command, *more, shell=closed, input="hello\n")
    speaks = command == "generate" or (command == "chat" and "<&-" not in closed)
    lost = speaks and ">&-" in closed.replace("2>&-", "")
    assert done.returncode == (1 if lost else 0), done.stderr
    assert "defect" not in done.stderr
    assert "Traceback" not in done.stderr
    if lost and "2>&-" not in closed:
        assert "the output: Bad file descriptor" in done.stderr
    if command == "batch":
        assert [("error" in row) for row in written(tmp_path / "out")] == [False] * 3


def test_retried_rows_stand_in_the_order_of_the_lines(model: str, tmp_path: Path) -> None:
    values: list[Any] = [{"custom_id": str(i), "prompt": f"say {i}"} for i in range(8)]
    values[1] |= {"temperature": "hot"}
    values[4] |= {"temperature": "hot"}
    values[7] |= {"temperature": "hot"}
    lines = lines_to(tmp_path / "a.jsonl", *values)
    done = run(model, tmp_path, "batch", lines, "-o", "out", "--ordered", "--parallel", "2")
    assert done.returncode == 1
    before = written(tmp_path / "out")
    assert ["error" in row for row in before] == [False, True, False, False, True, False, False, True]
    for i in (1, 4):
        del values[i]["temperature"]
    lines_to(tmp_path / "a.jsonl", *values)
    for _ in range(2):
        command = ["batch", lines, "-o", "out", "--ordered", "--retry-errors", "--parallel", "2"]
        assert run(model, tmp_path, *command).returncode == 1  # the last line is unchanged
        after = written(tmp_path / "out")
        assert [row["custom_id"] for row in after] == [str(i) for i in range(8)]
        assert ["error" in row for row in after] == [False] * 7 + [True]
    kept = [row for row in before if "error" not in row]
    assert [row for row in after if row["custom_id"] in "02356"] == kept
    assert not list(tmp_path.glob("*.tmp"))


def test_an_output_that_was_not_ordered_becomes_so(model: str, tmp_path: Path) -> None:
    values = [{"custom_id": str(i), "prompt": f"say {i}"} for i in range(6)]
    stranger = {"custom_id": "other", "prompt": "of an earlier input"}
    lines = lines_to(tmp_path / "a.jsonl", stranger, *reversed(values))
    assert run(model, tmp_path, "batch", lines, "-o", "out", "--parallel", "1").returncode == 0
    lines_to(tmp_path / "a.jsonl", *values)
    assert run(model, tmp_path, "batch", lines, "-o", "out", "--ordered", "--parallel", "1").returncode == 0
    assert [row["custom_id"] for row in written(tmp_path / "out")] == [*"012345", "other"]


def places_of(*numbers: int) -> Places:
    places = Places()
    for number in numbers:
        places.add(f"row-{number}")
    return places


def test_the_order_is_lost_by_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run_rows(out, 5)
    content = out.read_bytes()

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with opened(out) as journal:
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", fails)
            with pytest.raises(EmlocalError, match="cannot write"):
                journal.put_in_order(places_of(3, 1, 0, 4, 2))
        assert out.read_bytes() == content
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.run"]
    with opened(out) as journal:
        assert journal.put_in_order(places_of(3, 1, 0, 4))
        assert not journal.put_in_order(places_of(3, 1, 0, 4))
        with pytest.raises(EmlocalError, match="is being written"):
            opened(out)
        journal.append(row(9))  # at the end of the new file
    assert [each["key"] for each in written(out)] == [f"row-{n}" for n in (3, 1, 0, 4, 2, 9)]


def test_two_names_of_one_output_are_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.touch()
    two.hardlink_to(one)
    with opened(one) as journal:
        journal.append(row(1))
        for restart in (False, True):
            if restart:
                manifest_path(two).write_bytes(b"")
            with pytest.raises(
                EmlocalError, match=r"two (is being written .* under another name|exists and)"
            ):
                opened(two, restart=restart)
            assert restart or not manifest_path(two).exists()
        journal.append(row(2))
    assert len(written(one)) == 2


def test_two_processes_on_two_names_of_an_empty_file(model: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.touch()
    two.hardlink_to(one)
    lines = lines_to(tmp_path / "a.jsonl", *({"prompt": f"say {i}"} for i in range(100)))
    with opened(one):  # like a process that has no row yet
        done = run(model, tmp_path, "batch", lines, "-o", "two", "--parallel", "1")
        assert done.returncode == 1
        assert "under another name of the same file" in done.stderr.replace("\n", " ")
        assert two.stat().st_size == 0
        assert not manifest_path(two).exists()


def test_after_errors_were_dropped_the_new_file_is_locked(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    with opened(out) as journal:
        journal.append({"key": "row-0", "text": None, "error": "bad"})
        journal.append(row(1))
    with opened(out, retry_errors=True) as journal:
        other.hardlink_to(out)
        manifest_path(other).write_bytes(b"")
        with pytest.raises(EmlocalError, match="under another name"):
            opened(other)
        journal.append(row(0))
    assert [each["key"] for each in written(out)] == ["row-1", "row-0"]


@pytest.mark.parametrize("inner", ["[" * 200_000, '{"a":' * 200_000, "9" * 5_000])
def test_a_manifest_of_deep_json_is_one_that_is_cut_short(tmp_path: Path, inner: str) -> None:
    out = tmp_path / "out"
    manifest_path(out).write_text('{"format": "emlocal-batch-1", "settings": ' + inner + "\n")
    out.write_text("{}\n")
    with pytest.raises(UsageError, match="is not an output of emlocal"):
        opened(out)
    out.write_text("")
    opened(out).close()


def test_a_loop_of_links_leaves_nothing_behind(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UsageError, match="a link to itself"):
        opened(loop)
    assert list(tmp_path.iterdir()) == [loop]


KIB = [500_000, *(pytest.param(kib, marks=pytest.mark.attack) for kib in (60_000, 100_000, 150_000, 200_000))]


@pytest.mark.parametrize("kib", KIB)
def test_a_tight_limit_on_memory_is_no_defect(model: str, tmp_path: Path, kib: int) -> None:
    done = run(model, tmp_path, "generate", "hi", shell="</dev/null", first=f"ulimit -v {kib};")
    assert "defect" not in done.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "memory ran out"),
        (OSError(12, "Cannot allocate memory"), "memory ran out"),
        (RuntimeError("can't start new thread"), "refused more memory or threads"),
        (ImportError("libx.so: failed to map segment from shared object"), "refused more memory or threads"),
    ],
)
def test_what_a_limit_refuses_is_named(error: Exception, says: str) -> None:
    found = explained(error)
    assert says in found.message
    assert "defect" not in found.hint
    assert found.hint
    assert "defect" in explained(KeyError("x")).hint
