"""The journal on real files: the contents of an output on opening, and the effects of appending."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from emlocal.batch.journal import Journal
from emlocal.errors import EmlocalError, UsageError
from tests.batch.writer import opened, row, run


@contextmanager
def refused(error: type[EmlocalError], *parts: str) -> Iterator[None]:
    with pytest.raises(error) as caught:
        yield
    assert "\n" not in caught.value.message
    for part in parts:
        assert part in f"{caught.value.message} | {caught.value.hint}"


def error_row(number: int) -> dict[str, object]:
    return {"key": f"row-{number}", "text": None, "error": "too long"}


def test_rows_come_back_as_they_were(output: Path) -> None:
    rows: list[dict[str, object]] = [
        {"key": "a", "text": "line\nbreak \r \u2028 \x85 \0 ü 😀", "error": None},
        {"key": "b", "text": "half a pair: \ud83d", "error": None},
        {"key": "\udc00", "text": "", "error": None},
    ]
    with opened(output) as journal:
        for each in rows:
            journal.append(each)
    content = output.read_bytes()
    assert [json.loads(line) for line in content.decode().split("\n")[:-1]] == rows
    assert "ü 😀".encode() in content
    with opened(output) as journal:
        assert "\udc00" in journal.done
        assert (journal.rows, journal.errors, journal.repaired) == (3, 0, 0)
    assert output.read_bytes() == content


def test_rows_are_in_the_file_as_soon_as_they_are_appended(output: Path) -> None:
    with opened(output) as journal:
        journal.append(row(0))
        assert json.loads(output.read_text(encoding="utf-8")) == row(0)
        assert "row-0" in journal.done


def test_a_row_that_must_not_be_written_leaves_no_trace(output: Path) -> None:
    with opened(output) as journal:
        journal.append(row(0))
        content = output.read_bytes()
        with pytest.raises(ValueError, match="'row-0'"):
            journal.append(row(0))
        with pytest.raises(ValueError, match="JSON compliant"):
            journal.append({"key": "nan", "error": None, "entropy": float("nan")})
        assert output.read_bytes() == content
        assert "nan" not in journal.done
        journal.append(row(1))
    assert journal.rows == 2


def _whole(folder: Path) -> bytes:
    path = folder / "whole.jsonl"
    run(path, 3)
    return path.read_bytes()


@pytest.mark.parametrize("tail", [b"", b"\0" * 4096, b"\0\0\n\0", b"\xff\xfe", b"[1]\n", b"{\n", b"\0\n\n"])
def test_a_torn_end_at_every_byte_is_repaired(tmp_path: Path, output: Path, tail: bytes) -> None:
    whole = _whole(tmp_path)
    run(output, 0)
    for cut in range(len(whole) + 1):
        torn = whole[:cut] + tail
        output.write_bytes(torn)
        kept = torn.rfind(b"\n", 0, cut) + 1
        with opened(output) as journal:
            assert journal.repaired == len(torn) - kept
            assert journal.rows == len(journal.done) == torn[:kept].count(b"\n")
        assert output.read_bytes() == whole[:kept]
        run(output, 3)
        assert output.read_bytes() == whole


@pytest.mark.parametrize(
    "line", [b"", b"null", b"[]", b"{", b"\xff", b"\0\0", b'{"key": "a"} {}', b"[" * 99999]
)
def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path, output: Path, line: bytes) -> None:
    first, second, third, _ = _whole(tmp_path).split(b"\n")
    run(output, 0)
    content = b"\n".join([first, line, second, third, b""])
    output.write_bytes(content)
    with refused(UsageError, f"line 2 of {output} is not a JSON object"):
        opened(output)
    assert output.read_bytes() == content


@pytest.mark.parametrize("line", ["{}", '{"key": 1, "error": null}', '{"key": "a"}', '{"error": null}'])
def test_a_row_of_somebody_else_is_refused(output: Path, line: str) -> None:
    run(output, 2)
    with output.open("a") as file:
        file.write(line + "\n")
    with refused(UsageError, f"line 3 of {output} is not a row of emlocal batch"):
        opened(output)


def test_a_key_that_comes_twice_is_refused(output: Path) -> None:
    run(output, 3)
    first = output.read_bytes().split(b"\n")[0]
    with output.open("ab") as file:
        file.write(first + b"\n")
    with refused(UsageError, f"line 4 of {output} repeats the key 'row-0'"):
        opened(output)


def test_error_rows_are_counted_and_can_be_dropped(output: Path) -> None:
    with opened(output) as journal:
        for number in range(6):
            journal.append(row(number) if number % 3 else error_row(number))
        assert (journal.rows, journal.errors) == (6, 2)
    output.chmod(0o640)
    with output.open("ab") as file:
        file.write(b'{"key": "torn')
    with opened(output, retry_errors=True) as journal:
        assert (journal.rows, journal.errors, journal.retried, journal.repaired) == (4, 0, 2, 13)
        assert "row-0" not in journal.done
        journal.append(row(0))
    keys = [json.loads(line)["key"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert keys == ["row-1", "row-2", "row-4", "row-5", "row-0"]
    assert output.stat().st_mode & 0o777 == 0o640
    with opened(output, retry_errors=True) as journal:
        assert (journal.rows, journal.retried) == (5, 0)


def test_a_run_of_errors_only_can_be_retried(output: Path) -> None:
    with opened(output) as journal:
        journal.append(error_row(0))
    with opened(output, retry_errors=True) as journal:
        assert (journal.rows, journal.retried) == (0, 1)
        journal.append(row(0))
    assert json.loads(output.read_text(encoding="utf-8")) == row(0)


def test_the_key_is_where_the_caller_says(output: Path) -> None:
    with Journal.open(output, {}, key_of=lambda row: str(row["id"]), is_error=lambda row: False) as journal:
        journal.append({"id": "a"})
        assert "a" in journal.done


def test_a_link_is_followed_and_shares_the_lock(tmp_path: Path, output: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    link = folder / "link.jsonl"
    link.symlink_to(output)
    run(link, 2)
    assert link.is_symlink()
    assert list(folder.iterdir()) == [link]
    with opened(output) as journal:
        assert journal.rows == 2
        second = f"{link} is being written by another emlocal (process {os.getpid()})"
        with refused(EmlocalError, second):
            opened(link)
    with opened(link, retry_errors=True) as journal:
        assert journal.rows == 2
    assert link.is_symlink()


def test_a_refused_opening_gives_the_output_free(output: Path) -> None:
    run(output, 1)
    for _ in range(3):
        with refused(UsageError, "other settings"):
            opened(output, {"seed": 3})
    with opened(output) as journal:
        with refused(EmlocalError, "is being written"):
            opened(output, restart=True)
        assert output.stat().st_size
        journal.close()
        opened(output).close()


def test_what_cannot_be_an_output_is_refused(tmp_path: Path) -> None:
    with refused(UsageError, "is a folder"):
        opened(tmp_path)
    with refused(UsageError, "there is no folder"):
        opened(tmp_path / "no" / "out.jsonl")
    with refused(UsageError, "is a pipe or a device"):
        opened(Path(os.devnull))
    os.mkfifo(tmp_path / "pipe")
    with refused(UsageError, "is a pipe or a device"):
        opened(tmp_path / "pipe")
    (tmp_path / "file").touch()
    with refused(UsageError, "there is no folder"):
        opened(tmp_path / "file" / "out.jsonl")
    with refused(EmlocalError, "cannot write", "File name too long"):
        opened(tmp_path / ("x" * 255))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with refused(UsageError, "a link to itself"):
        opened(tmp_path / "loop")


def test_a_folder_that_takes_no_files(tmp_path: Path) -> None:
    """/proc refuses even root."""
    folder = Path("/proc/self") if Path("/proc/self").is_dir() else tmp_path / "locked"
    if not folder.exists():
        folder.mkdir(mode=0o500)
    with refused(EmlocalError, f"cannot write {folder / 'out.jsonl'}: "):
        opened(folder / "out.jsonl")
