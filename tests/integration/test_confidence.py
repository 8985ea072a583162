"""Scores, confidence, calibration and abstaining on a real model: SmolLM2 adds small numbers."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import emlocal as package
from emlocal.answers.finding import find
from emlocal.em.scores import RANKED, Scores
from emlocal.errors import UsageError
from emlocal.models.resolve import GGUFModel
from tests.cli.conftest import Outcome, emlocal  # noqa: F401
from tests.evaluation.data import write

pytestmark = pytest.mark.real
Emlocal = Callable[..., Outcome]
ASK = "What is 4 + 5? Say the number alone."
SHORT = ("--max-tokens", "24", "-t", "1")


def sums(path: Path) -> tuple[str, str]:
    """Writes questions to calibrate on, and others."""
    pairs = [(a, b) for a in range(2, 12) for b in range(2, 14)]
    random.Random(0).shuffle(pairs)
    rows = [{"question": f"What is {a} + {b}? Say the number alone.", "answer": str(a + b)} for a, b in pairs]
    other = [{"custom_id": row["question"], "prompt": row["question"]} for row in rows[60:]]
    return str(write(path / "dev.jsonl", rows[:60])), str(write(path / "test.jsonl", other))


def test_calibrate_then_abstain(emlocal: Emlocal, smollm2: GGUFModel, tmp_path: Path) -> None:  # noqa: F811
    dev, test = sums(tmp_path)
    model, made, out = str(smollm2.path), tmp_path / "greedy.json", tmp_path / "eval"
    task = ("eval", "-m", model, "--task", "questions", "--data", dev, "--system", "", *SHORT)
    done = emlocal(*task, "--methods", "greedy", "-o", str(out), "--calibrate", str(made))
    assert done.code == 0, done.err
    assert re.search(rf"{made}: (Platt's curve|isotonic) on ", done.err)
    table = done.out.splitlines()
    assert "AUROC % (95 %)" in table[-2]
    assert table[-1].split()[:2] == ["greedy", "confidence"]
    scores = {s["score"]: s for s in json.loads((out / "results.json").read_text())["methods"][0]["scores"]}
    assert scores.keys() == {"confidence", *RANKED}
    assert scores["confidence"]["auroc"]["value"] > 0.6  # better than chance
    assert len(scores["confidence"]["risks"]) == 10
    assert "## Confidence" in (out / "results.md").read_text(encoding="utf-8")
    calibration = json.loads(made.read_text(encoding="utf-8"))
    assert calibration["fitted_on"]["answers"] == 60

    rows = tmp_path / "rows.jsonl"
    flags = ("--calibration", str(made), "--abstain-below", "0.5", *SHORT, "--parallel", "4")
    done = emlocal("batch", test, "-m", model, "-o", str(rows), "--method", "greedy", *flags)
    assert done.code == 0, done.err
    assert "warning" not in done.err
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    withheld = [row for row in found if row["abstained"]]
    given = [row for row in found if not row["abstained"]]
    assert f" · {len(withheld)} withheld (confidence below 0.5) · " in done.err
    assert len(given) >= 10
    assert len(withheld) >= 10
    assert all(row["calibrated"] and (row["confidence"] < 0.5) is row["abstained"] for row in found)
    assert all(row["text"] is None for row in withheld)
    right = [_right(row["custom_id"], row["text"]) for row in given]
    missed = [_right(row["custom_id"], row["withheld"]["text"]) for row in withheld]
    assert sum(right) / len(right) > sum(missed) / len(missed) + 0.2

    again = emlocal("batch", test, "-m", model, "-o", str(rows), "--method", "greedy", *SHORT)
    assert again.code == 2
    assert "abstain-below" in again.err  # another setting makes another run


def _right(question: str, text: str) -> bool:
    a, b = question.removeprefix("What is ").partition("?")[0].split(" + ")
    found = find(text)
    return found is not None and found.text == str(int(a) + int(b))


@pytest.fixture
def calibration(smollm2: GGUFModel, tmp_path: Path) -> Path:
    path = tmp_path / "made.json"
    value: dict[str, Any] = {
        "format": "emlocal-calibration-1",
        "model": str(smollm2.path), "method": "greedy", "samples": 1, "drawn": "T 0, EM off",
        "score": "mean-entropy",
        "curve": {"kind": "platt", "slope": 2, "intercept": 1, "low": 0.1, "high": 0.9},
        "fitted_on": {}, "cross_fitted": {},
    }  # fmt: skip
    with package.load(smollm2.path, threads=1, context=128) as model:
        value["model"] = model.backend.info.name
    path.write_text(json.dumps(value))
    return path


def test_one_answer_says_how_sure_it_is_wherever_it_is_asked_for(
    emlocal: Emlocal,  # noqa: F811
    smollm2: GGUFModel,
    calibration: Path,
) -> None:
    model = ("-m", str(smollm2.path), *SHORT)
    shown = emlocal("generate", ASK, *model, "--method", "greedy", "--json")
    plain = json.loads(shown.out)
    assert plain["scores"].keys() == Scores.__dataclass_fields__.keys()
    assert plain["scores"]["answer_entropy"] is not None
    assert (plain["confidence_from"], plain["calibrated"]) == ("mean-log-probability", False)
    how = ("--method", "greedy", "--calibration", str(calibration))
    found = json.loads(emlocal("generate", ASK, *model, *how, "--json").out)
    assert found["scores"] == plain["scores"]
    assert (found["confidence_from"], found["calibrated"]) == ("mean-entropy", True)
    assert found["confidence"] != plain["confidence"]

    said = f"confidence {found['confidence']:.2f}"
    line = emlocal("generate", ASK, *model, *how).err
    assert f" · {said} · " in line
    chat = emlocal("chat", *model, *how, stdin=f"{ASK}\n/stats\n/exit\n").err
    assert f"\n{said}\n" in chat
    assert f"log-probability {plain['scores']['log_probability']:.1f}" in chat
    with package.load(smollm2.path, threads=1) as loaded:
        answer = loaded.generate(ASK, method="greedy", max_tokens=24, calibration=calibration)
        assert answer.confidence == pytest.approx(found["confidence"], abs=0.02)  # the prompt cache differs
        assert answer.calibrated
        assert answer.scores is not None
        assert answer.scores.tokens == plain["scores"]["tokens"]
        (row,) = loaded.batch(
            [ASK], method="greedy", max_tokens=24, calibration=calibration, abstain_below=0.95
        )
        assert (row["abstained"], row["text"], row["calibrated"]) == (True, None, True)
        with pytest.warns(UserWarning, match="method greedy, not sample"):
            other = loaded.generate(ASK, method="sample", max_tokens=4, calibration=calibration)
        assert not other.calibrated
        with pytest.raises(UsageError, match="abstain_below is 2"):
            loaded.batch([ASK], abstain_below=2)


def test_other_answers_than_those_that_were_calibrated_are_warned_of(
    emlocal: Emlocal,  # noqa: F811
    smollm2: GGUFModel,
    calibration: Path,
) -> None:
    model = ("-m", str(smollm2.path), *SHORT, "--calibration", str(calibration))
    found = emlocal("generate", ASK, *model, "--method", "sample", "-n", "2", "--json")
    assert f"warning: {calibration} was fitted on other answers (method greedy, not sample;" in found.err
    each = json.loads(found.out)["completions"]
    assert all(one["calibrated"] is False and one["confidence_from"] == "mean-entropy" for one in each)
    missing = emlocal("generate", ASK, "-m", str(smollm2.path), "--calibration", "nothing.json")
    assert missing.code == 2
    assert "there is no file nothing.json" in missing.err


def test_calibrate_is_for_one_method(emlocal: Emlocal, tmp_path: Path) -> None:  # noqa: F811
    dev, _ = sums(tmp_path)
    done = emlocal("eval", "--task", "questions", "--data", dev, "--calibrate", "c.json")
    assert done.code == 2
    assert "--calibrate needs exactly one method; --methods names 3" in done.err
    away = emlocal(
        "eval", "--task", "questions", "--data", dev, "--methods", "greedy", "--calibrate", "no/c.json"
    )
    assert away.code == 2
    assert "name a file in a folder that exists" in away.err
