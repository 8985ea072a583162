"""Real processes on real files: killed, meeting another one, out of space, and measured."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emlocal.batch.output import manifest_path
from emlocal.errors import EmlocalError
from tests.batch.writer import opened, row, run

REPOSITORY = Path(__file__).parents[2]


def child(path: Path, rows: int, what: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.batch.writer", str(path), str(rows), what],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(path: Path, rows: int, what: str = "") -> tuple[str, str]:
    with child(path, rows, what) as process:
        return process.communicate(timeout=60)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def whole(path: Path, rows: int, size: int) -> bytes:
    uninterrupted = path.with_name("uninterrupted.jsonl")
    run(uninterrupted, rows, size)
    return uninterrupted.read_bytes()


def test_thirty_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    path, rows, kills = tmp_path / "out.jsonl", 20_000, 0
    moments = random.Random(3)
    while True:
        with child(path, rows) as process:
            held = int(first_line(process).split()[1])
            if kills < 30:
                time.sleep(moments.uniform(0, 0.01))
                process.kill()
            process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        assert path.read_bytes().count(b"\n") >= held
        kills += 1
    assert kills == 30
    assert path.read_bytes() == whole(path, rows, 5000)


def test_a_second_process_is_refused_and_a_killed_one_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with child(path, 0, "hold") as process:
        assert first_line(process) == "open\n"
        _, error = finished(path, 3)
        assert error == (
            f"{path} is being written by another emlocal (process {process.pid})"
            " | wait for it to end, or use another -o\n"
        )
        process.kill()
        process.communicate()
    output, error = finished(path, 3)
    assert output == "open 0 0 0\nend\n", error
    assert manifest_path(path).read_text().count("\n") == 1


@pytest.mark.parametrize("limit", [4000, 5046, 5047, 12_345, 30_000])
def test_a_full_disk_keeps_the_whole_rows_and_says_so(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "out.jsonl"
    expected = whole(path, 10, 5000)
    safe = expected[:limit].count(b"\n")
    output, error = finished(path, 10, f"full={limit}")
    assert error == (
        f"cannot write {path}: File too large; {safe} rows are safe"
        " | free some space, then run the same command to resume\n"
    )
    assert output == "open 0 0 0\n"
    assert path.read_bytes() == expected[: expected.rfind(b"\n", 0, limit) + 1]
    assert finished(path, 10)[0] == f"open {safe} 0 0\nend\n"
    assert path.read_bytes() == expected


def _mixed(path: Path, rows: int) -> tuple[bytes, bytes]:
    """Writes an output in which every fourth row is an error.

    Returns its content, and that without errors.
    """
    run(path, 0)
    every = [
        row(n, 2000) if n % 4 else {"key": f"row-{n}", "text": "", "error": "x" * 2000} for n in range(rows)
    ]
    lines = [json.dumps(each, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for each in every]
    path.write_bytes(b"".join(lines))
    return b"".join(lines), b"".join(line for number, line in enumerate(lines) if number % 4)


def test_a_kill_while_errors_are_dropped_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path, temporary = tmp_path / "out.jsonl", tmp_path / "out.jsonl.run.tmp"
    old, new = _mixed(path, 20_000)
    moments = random.Random(5)
    halfway = 0
    for _ in range(10):
        path.write_bytes(old)
        with child(path, 0, "retry") as process:
            while process.poll() is None and not temporary.exists():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.2))
            process.kill()
            process.communicate()
        halfway += temporary.exists()
        assert path.read_bytes() in (old, new)
    assert halfway  # some kills came while the new file was being written
    path.write_bytes(old)
    assert finished(path, 0, "retry")[0] == "open 15000 0 5000\nend\n"
    assert path.read_bytes() == new
    assert not temporary.exists()


def test_a_disk_too_full_to_drop_errors_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    old, _ = _mixed(path, 100)
    limit = 20_000
    program = (
        "import resource, sys; from pathlib import Path; from tests.batch.writer import opened;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "opened(Path(sys.argv[1]), retry_errors=True)"
    )
    failed = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"EmlocalError: cannot write {path}: File too large" in failed.stderr
    assert path.read_bytes() == old
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run"]


def test_opening_a_long_output_takes_no_more_memory(tmp_path: Path) -> None:
    peaks = []
    for rows in (2_000, 200_000):
        path = tmp_path / f"{rows}.jsonl"
        run(path, 0)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row(number, 200)) + "\n" for number in range(rows))
        output, error = finished(path, rows, "measure")
        assert output.split()[0] == str(rows), error
        peaks.append(int(output.split()[1]))
    assert peaks[1] - peaks[0] < 20_000_000


def test_a_sync_that_fails_gives_back_what_may_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one fault that is simulated here: a disk that accepts rows and then fails to store them."""
    path = tmp_path / "out.jsonl"
    run(path, 2)
    journal = opened(path)
    journal.append(row(2))

    def fail(descriptor: int) -> None:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(EmlocalError, match="Input/output error; 2 rows are safe"):
            journal.close()
    with opened(path) as journal:
        assert journal.rows == 2
        journal.append(row(2))
    assert path.read_bytes() == whole(path, 3, 0)


def test_ctrl_c_between_two_parts_of_a_row_leaves_no_torn_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    write, parts = os.write, [10]

    def interrupted(descriptor: int, data: bytes) -> int:
        if not parts:
            raise KeyboardInterrupt
        return write(descriptor, data[: parts.pop()])

    with opened(path) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                journal.append(row(0))
        for number in range(3):
            journal.append(row(number))
    assert path.read_bytes() == whole(path, 3, 0)
