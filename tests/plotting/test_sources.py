"""The kinds of paths, and which may be combined."""

from pathlib import Path

import pytest

from emlocal.errors import UsageError
from emlocal.plotting import kind_of
from tests.plotting.data import evaluation, rows, run, trace


def test_kinds(tmp_path: Path) -> None:
    ran, evaluated = run(tmp_path / "run", rows()), evaluation(tmp_path / "eval")
    traced = trace(tmp_path / "t.jsonl")
    assert kind_of([ran]) == kind_of([ran, ran / "metrics.jsonl"]) == "run"
    assert kind_of([evaluated, evaluated / "results.json"]) == "evaluation"
    assert kind_of([traced]) == "trace"
    with pytest.raises(UsageError, match=r"run is a training run and .*eval is an evaluation; they cannot"):
        kind_of([ran, evaluated])
    with pytest.raises(UsageError, match=r"eval is an evaluation and .*t\.jsonl is a trace"):
        kind_of([evaluated, evaluated, traced])


def test_what_is_nothing_of_the_kind(tmp_path: Path) -> None:
    (tmp_path / "cut" / "answers").mkdir(parents=True)
    for path, says in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "has neither a run"),
        (tmp_path / "cut", "is not finished"),
    ):
        with pytest.raises(UsageError, match=says):
            kind_of([path])
