"""`emlocal.evaluate` equals the command: the same results, checks and warnings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import emlocal
from emlocal.errors import UsageError
from tests.cli.conftest import Outcome
from tests.cli.conftest import emlocal as verb  # noqa: F401
from tests.cli.conftest import tiny as tiny
from tests.evaluation.data import write

METHODS = "greedy,sample,em-inf"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write(tmp_path / "q.jsonl", [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(4)])


def timeless(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for method in found["methods"]:
        del method["cost"]["seconds"]
    return found


def test_python_finds_what_the_verb_does(
    questions: Path,
    tmp_path: Path,
    tiny: str,
    verb: Callable[..., Outcome],  # noqa: F811
) -> None:
    told: list[str] = []
    few = {"model": tiny, "max_tokens": 8, "parallel": 2, "threads": 1, "samples": 2, "min_p": 0.1, "seed": 3}
    found = emlocal.evaluate(
        "gsm8k",
        METHODS,
        data=questions,
        output=tmp_path / "python",
        progress=lambda what, done, total: told.append(f"{what} {done}/{total}"),
        **few,
    )
    flags = ("--max-tokens", "8", "--parallel", "2", "-t", "1", "-n", "2", "--min-p", "0.1", "--seed", "3")
    asked = ("-m", tiny, "--task", "gsm8k", "--data", str(questions), "--methods", METHODS)
    assert verb("eval", *asked, *flags, "-o", str(tmp_path / "verb")).code == 0
    assert timeless(tmp_path / "python") == timeless(tmp_path / "verb")
    assert [method.name for method in found.methods] == METHODS.split(",")
    assert [each.name for each in found.comparisons] == ["sample", "em-inf"]
    assert found.folder == tmp_path / "python"
    assert {"greedy 4/4", "sample 8/8", "em-inf 8/8", "judging 20/20"} <= set(told)
    with pytest.raises(UsageError, match="was started with other settings: seed: 3 -> 4"):
        emlocal.evaluate("gsm8k", METHODS, data=questions, output=tmp_path / "python", **few | {"seed": 4})


def test_questions_that_do_not_fit_are_warned_of(questions: Path, tmp_path: Path, tiny: str) -> None:
    with pytest.warns(UserWarning, match="greedy: 4 questions did not fit"):
        found = emlocal.evaluate(
            "gsm8k", "greedy", model=tiny, data=questions, output=tmp_path / "out", context=16, parallel=1
        )
    assert [method.errors for method in found.methods] == [4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"limt": 3}, "there is no setting .limt."),
        ({"methods": "best"}, "a method is one of"),
        ({"samples": 0}, "samples is 0"),
        ({"parallel": 0}, "parallel is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"data": "/no/such/file.jsonl"}, "there is no file /no/such/file.jsonl"),
    ],
)
def test_bad_settings(
    questions: Path, tmp_path: Path, tiny: str, given: dict[str, Any], message: str
) -> None:
    asked = {"methods": "greedy", "model": tiny, "data": questions, "output": tmp_path / "out", **given}
    with pytest.raises(UsageError, match=message):
        emlocal.evaluate("gsm8k", **asked)
    assert not (tmp_path / "out").exists()
