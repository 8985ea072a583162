"""`emlocal batch` on a tiny model in real llama.cpp."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Outcome

Emlocal = Callable[..., Outcome]
SHORT = ("--max-tokens", "4", "--parallel", "2")
REPOSITORY = Path(__file__).parents[2]
LINES: list[Any] = [{"custom_id": f"q{i}", "prompt": f"hello {i}", "note": i} for i in range(5)]
MIXED: list[Any] = [*LINES, {"custom_id": "bad", "prompt": 5}]


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def read(path: Path | str) -> list[dict[str, Any]]:
    text = path.read_text() if isinstance(path, Path) else path
    return [json.loads(line) for line in text.splitlines()]


def named(found: list[dict[str, Any]]) -> dict[str, Any]:
    assert len({row["custom_id"] for row in found}) == len(found)
    return {row["custom_id"]: row for row in found}


@pytest.fixture
def good(tmp_path: Path) -> str:
    return write(tmp_path / "in.jsonl", LINES)


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    return write(tmp_path / "in.jsonl", MIXED)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def batch(emlocal: Emlocal, tiny: str) -> Emlocal:
    return lambda *arguments, **more: emlocal("batch", "-m", tiny, *SHORT, *arguments, **more)


def test_a_file_becomes_a_file(batch: Emlocal, good: str, out: Path) -> None:
    done = batch(good, "-o", str(out), "--em-inf", "--ordered", "--keep")
    assert (done.code, done.out) == (0, "")
    rows = read(out)
    assert [row["custom_id"] for row in rows] == [f"q{i}" for i in range(5)]
    assert [row["kept"] for row in rows] == [{"note": i} for i in range(5)]
    assert {row["method"] for row in rows} == {"em-inf"}
    assert all(0 < row["completion_tokens"] <= 4 and row["seed"] == 0 for row in rows)
    assert "5 answers in" in done.err


def test_without_output_rows_go_to_stdout_and_stdin_is_read(batch: Emlocal, good: str) -> None:
    from_file = batch(good, "-q")
    piped = batch("-", stdin=Path(good).read_text())
    assert from_file.code == piped.code == 0
    assert from_file.err == ""
    texts = [
        {name: row["text"] for name, row in named(read(done.out)).items()} for done in (from_file, piped)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 5


def test_the_same_seed_the_same_rows(batch: Emlocal, good: str) -> None:
    def texts(*more: str) -> list[str]:
        return [row["text"] for row in read(batch(good, "--ordered", "-q", *more).out)]

    assert texts() == texts("--seed", "0")
    assert texts() != texts("--seed", "1")


def test_a_second_run_goes_on(batch: Emlocal, tmp_path: Path, out: Path) -> None:
    source = write(tmp_path / "in.jsonl", LINES[:3])
    assert batch(source, "-o", str(out)).code == 0
    before = out.read_bytes()
    write(tmp_path / "in.jsonl", LINES)
    done = batch(source, "-o", str(out))
    assert done.code == 0
    assert "has 3 rows; continuing after them" in done.err
    assert "3 already there" in done.err
    assert out.read_bytes().startswith(before)
    assert len(named(read(out))) == 5
    whole = out.read_bytes()
    done = batch(source, "-o", str(out))
    assert done.code == 0
    assert "at once" not in done.err  # nothing is left, so no number of sequences is measured
    assert out.read_bytes() == whole


def test_a_torn_row_is_cut_off_and_made_again(batch: Emlocal, good: str, out: Path) -> None:
    batch(good, "-o", str(out), "--ordered")
    whole = named(read(out))
    out.write_bytes(out.read_bytes()[:-20])
    done = batch(good, "-o", str(out), "--ordered")
    assert "ended in an incomplete row" in done.err
    assert {name: row["text"] for name, row in named(read(out)).items()} == {
        name: row["text"] for name, row in whole.items()
    }


def test_other_settings_are_refused_with_what_differs(batch: Emlocal, good: str, out: Path) -> None:
    batch(good, "-o", str(out))
    before = out.read_bytes()
    done = batch(good, "-o", str(out), "--seed", "3", "--temp", "0.7")
    assert done.code == 2
    assert "was started with other settings" in done.err
    assert "seed: 0 -> 3" in done.err
    assert "sampling.temperature: 0.5 -> 0.7" in done.err  # the model's own was 0.5
    assert out.read_bytes() == before
    again = batch(good, "-o", str(out), "--seed", "3", "--restart")
    assert again.code == 0
    assert {row["seed"] for row in read(out)} == {3}
    assert len(read(out)) == 5


def test_somebody_else_s_file_is_not_touched(batch: Emlocal, good: str, out: Path) -> None:
    out.write_text("my notes\n")
    done = batch(good, "-o", str(out))
    assert done.code == 2
    assert "is not an output of emlocal" in done.err
    assert out.read_text() == "my notes\n"
    assert not out.with_name("out.jsonl.run").exists()


def test_bad_lines_are_rows_counted_and_tried_again(batch: Emlocal, mixed: str, out: Path) -> None:
    done = batch(mixed, "-o", str(out))
    assert done.code == 1
    assert "1 line could not be answered" in done.err
    assert named(read(out))["bad"]["error"] == "prompt is a number; it must be a text"
    assert batch(mixed, "-o", str(out)).code == 1  # it still has an error
    write(Path(mixed), [*LINES, {"custom_id": "bad", "prompt": "good now"}])
    done = batch(mixed, "-o", str(out), "--retry-errors")
    assert done.code == 0
    rows = named(read(out))
    assert len(rows) == 6
    assert "text" in rows["bad"]


def test_fail_fast(batch: Emlocal, tmp_path: Path, out: Path) -> None:
    source = write(tmp_path / "in.jsonl", [MIXED[-1], *LINES])
    done = batch(source, "-o", str(out), "--fail-fast")
    assert done.code == 1
    assert len(read(out)) == 1
    assert batch(source, "-o", str(out), "--fail-fast").code == 1
    assert len(read(out)) == 6


def test_a_prompt_over_the_context_is_an_error_row(batch: Emlocal, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"custom_id": "long", "prompt": "etaoin " * 60}, LINES[0]])
    done = batch(source, "--context", "64")
    rows = named(read(done.out))
    assert done.code == 1
    assert "the context holds 64" in rows["long"]["error"]
    assert "text" in rows["q0"]


def test_half_characters_reach_stdout_and_stop_nothing(batch: Emlocal) -> None:
    lines = '{"prompt": "a", "gold": "\\ud800"}\n{"prompt": "b", "gold": "ü😀"}\n{"\\ud800": 1}\n'
    done = batch("-", "--keep", stdin=lines)
    rows = read(done.out)
    assert done.code == 1
    assert sum("half of a surrogate pair" in row.get("error", "") for row in rows) == 2
    assert [row["kept"] for row in rows if "kept" in row] == [{"gold": "ü😀"}]


def test_fields_that_the_rows_leave_out_are_named_once(batch: Emlocal, tmp_path: Path) -> None:
    lines = [{"prompt": "a"}, {"id": "x", "topic": "t", "prompt": "b"}, {"id": "y", "prompt": "c"}]
    source = write(tmp_path / "in.jsonl", lines)
    note = "the rows leave out the lines' own id, topic"
    assert batch(source).err.count(note) == 1
    assert "an id called custom_id names the row" in batch(source, "--dry-run").err
    for quiet in (batch(source, "--keep"), batch(source, "-q"), batch(write(tmp_path / "b", lines[:1]))):
        assert "leave out" not in quiet.err
    many = {f"column {i}": i for i in range(9)}
    said = batch(write(tmp_path / "many.jsonl", [{"prompt": "a", **many}])).err
    assert "own column 0, column 1, column 2, column 3, column 4 and 4 more (add --keep" in said


def test_an_empty_input(batch: Emlocal, tmp_path: Path, out: Path) -> None:
    for raw in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
        (tmp_path / "in.jsonl").write_bytes(raw)
        done = batch(str(tmp_path / "in.jsonl"), "-o", str(out))
        assert done.code == 0
        assert out.read_bytes() == b""


def test_a_dry_run_writes_nothing(batch: Emlocal, good: str, out: Path, tmp_path: Path) -> None:
    done = batch(good, "-o", str(out), "--dry-run")
    assert done.code == 0
    assert not list(tmp_path.glob("out*"))
    shown = dict(
        line.split(None, 1) for line in done.out.splitlines() if line.startswith(("lines", "memory"))
    )
    assert shown["lines"] == "5"
    assert "may be cut off          0" in done.out
    assert "generated at most       20 tokens" in done.out


def test_a_dry_run_counts_what_is_wrong(batch: Emlocal, tmp_path: Path) -> None:
    lines = [*MIXED, {"prompt": "x", "temperature": -1}, {"prompt": "etaoin " * 60}, "x" * 30]
    done = batch(write(tmp_path / "in.jsonl", lines), "--dry-run", "--context", "64", "--max-tokens", "40")
    assert done.code == 1
    assert "bad lines               2" in done.out
    assert "line 6: prompt is a number; it must be a text" in done.out
    assert "line 7: temperature is -1; it must be between 0 and 100" in done.out
    assert "do not fit the context  1 (of 64 tokens)" in done.out
    cut = next(line for line in done.out.splitlines() if line.startswith("may be cut off"))
    assert int(cut.split()[4]) >= 1


def test_openai_s_format(batch: Emlocal, tmp_path: Path, out: Path) -> None:
    body = {"model": "gpt", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "n": 2}
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    source = write(tmp_path / "in.jsonl", [asked, MIXED[-1]])
    assert batch(source, "-o", str(out), "--format", "openai").code == 1
    rows = named(read(out))
    assert len(rows["a"]["response"]["body"]["choices"]) == 2
    assert rows["a"]["error"] is None
    assert rows["bad"]["error"]["message"].startswith("prompt is a number")
    done = batch(source, "-o", str(out), "--format", "openai")
    assert "has 2 rows, 1 error among them" in done.err
    assert batch(source, "-o", str(out)).code == 2  # the other format


def test_self_consistency(batch: Emlocal, good: str) -> None:
    done = batch(good, "--method", "self-consistency", "-n", "3", "--extract", "none", "-q")
    rows = read(done.out)
    assert [len(row["samples"]) for row in rows] == [3] * 5
    assert all(row["votes"] >= 1 for row in rows if row["answer"])


def test_votes_go_on_where_they_were(batch: Emlocal, good: str, out: Path) -> None:
    vote = ("--method", "vote:3", "--wave", "2", "--extract", "none", "-o", str(out))
    assert batch(good, *vote, "-q").code == 0
    rows = read(out)
    assert {row["method"] for row in rows} == {"vote"}
    assert all(row["drawn"] == len(row["samples"]) for row in rows)
    out.write_text("".join(line + "\n" for line in out.read_text().splitlines()[:2]))
    done = batch(good, *vote)
    assert "2 rows" in done.err
    assert [row["text"] for row in sorted(read(out), key=lambda row: row["custom_id"])] == [
        row["text"] for row in sorted(rows, key=lambda row: row["custom_id"])
    ]
    refused = batch(good, *vote[:-2], "-o", str(out), "--vote-sure", "1")
    assert refused.code == 2
    assert "vote-sure: 0.95 -> 1" in refused.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--parallel", "0"], "--parallel is 0; it must be between 1 and 256"),
        (["--parallel", "257"], "--parallel is 257"),
        (["--samples", "0"], "--samples is 0"),
        (["--method", "best"], "best"),
        (["--rounds", "2"], "--rounds belongs to --method sequential-refinement"),
        (["--extract", "boxed"], "--extract belongs to --method self-consistency"),
        (["--method", "self-consistency", "-n", "1"], "needs at least 2 to vote"),
        (["--method", "self-consistency", "--extract", "regex"], "--extract regex needs a pattern"),
        (["--method", "greedy", "--em-inf"], "--method greedy and the EM flags contradict each other"),
        (["--method", "greedy", "--temp", "1"], "--method greedy and --temp contradict each other"),
        (["--method", "em-inf", "--adaptive-temp"], "--method em-inf and the EM flags contradict each other"),
        (["--em-inf", "--adaptive-temp"], "contradict each other"),
        (["--temp", "-1"], "--temp is -1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--retry-errors"], "--retry-errors needs an output"),
        (["--retry-errors", "--restart", "-o", "OUT"], "--retry-errors needs an output"),
        (["-o", "IN"], "is the input and would be overwritten"),
        (["-o", "/"], "is a folder"),
        (["-o", "/no/such/folder/out.jsonl"], "there is no folder /no/such/folder"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    batch: Emlocal, good: str, out: Path, arguments: list[str], says: str
) -> None:
    before = Path(good).read_bytes()
    places = {"OUT": str(out), "IN": good}
    done = batch(good, *(places.get(argument, argument) for argument in arguments))
    assert done.code == 2
    assert says in done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert not out.exists()
    assert Path(good).read_bytes() == before


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_an_input_that_is_not_there(batch: Emlocal, tmp_path: Path, out: Path, name: str) -> None:
    done = batch(str(tmp_path / name), "-o", str(out))
    assert done.code == 2
    assert "cannot read" in done.err
    assert not out.exists()


def test_the_input_by_another_name_is_still_the_input(batch: Emlocal, good: str, tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(good)
    done = batch(good, "-o", str(link), "--restart")
    assert done.code == 2
    assert "is the input" in done.err
    assert len(read(Path(good))) == 5


def test_an_output_that_another_process_writes(batch: Emlocal, good: str, out: Path) -> None:
    command = [sys.executable, "-m", "tests.batch.writer", str(out), "0", "hold"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        done = batch(good, "-o", str(out))
        process.kill()
    assert done.code == 1
    assert f"is being written by another emlocal (process {process.pid})" in done.err
    assert out.read_bytes() == b""
