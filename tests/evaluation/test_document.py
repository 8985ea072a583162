"""Reading results.json."""

import json
from pathlib import Path
from typing import Any

import pytest

from emlocal.errors import EmlocalError, UsageError
from emlocal.evaluation.report.document import Standing, read_results, write_json
from tests.evaluation.test_report import made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_json(made(2), tmp_path / "results.json")
    return tmp_path / "results.json"


def test_what_was_written_is_read(path: Path) -> None:
    found = read_results(path)
    assert (found.task, found.problems, found.model) == ("sums", 6, "tiny")
    assert list(found.standings) == [Standing.of(method) for method in made(2).methods]


def changed(path: Path, *keys: Any, to: Any) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    inner = value
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize(
    ("keys", "to", "says"),
    [
        (("format",), "emlocal-eval-2", "its format is emlocal-eval-2, this one reads emlocal-eval-1"),
        (("format",), "other", "has no results of eval"),
        (("methods",), [], "it has no methods"),
        (("methods", 0), 7, "a method is not an object"),
        (("methods", 1, "accuracy", "low"), "x", "low is missing, or not a number"),
        (("methods", 1, "accuracy", "low"), float("nan"), "low is missing, or not a number"),
        (("methods", 1, "accuracy", "high"), 7, "an accuracy is"),
        (("methods", 0, "cost"), None, "cost is missing, or not an object"),
        (("methods", 0, "cost", "flops"), 10**400, "flops is missing, or not a number"),
        (("task", "name"), None, "name is missing, or not a text"),
    ],
)
def test_what_is_not_as_it_was_written(path: Path, keys: tuple[Any, ...], to: Any, says: str) -> None:
    changed(path, *keys, to=to)
    with pytest.raises(UsageError, match=says):
        read_results(path)


def test_names_cannot_paint_the_terminal(path: Path) -> None:
    changed(path, "methods", 0, "name", to="a\x1b[2J\ud800")
    assert read_results(path).standings[0].name == "a\ufffd[2J?"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is not JSON, or is damaged, at line 1"),
        (b'{"format": "emlo', "is not JSON, or is damaged, at line 1"),
        (b"\x7fELF\xff\x00", "byte 4 is not UTF-8 text"),
        (b"[1]", "has no results of eval"),
        (b"[" * 100_000, "has no results of eval"),
    ],
)
def test_what_is_no_file_of_results(tmp_path: Path, raw: bytes, says: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(raw)
    with pytest.raises(UsageError, match=says) as error:
        read_results(path)
    assert "\n" not in str(error.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_results(tmp_path / "results.json")
    with pytest.raises(EmlocalError, match="cannot read"):
        read_results(tmp_path)
