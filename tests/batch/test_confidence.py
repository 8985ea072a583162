"""Scores and confidence in rows; abstaining below a confidence."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emlocal.em.scores import RANKED, Scores
from emlocal.methods import Chosen
from emlocal.methods.confidence import FREE, METHOD, Calibration, Isotonic, Platt, subject_of
from emlocal.settings import SamplingParams
from tests.batch.batches import Row, batch, row, rows, settings
from tests.batch.test_methods import one_of

ASK = {"custom_id": "a", "prompt": "hi"}
HOT = SamplingParams(temperature=1.0)
VOTE = Chosen("self-consistency", samples=6)
LINES = [{"custom_id": str(i), "prompt": f"question {i}"} for i in range(8)]


def test_every_sample_has_its_scores_and_the_row_those_of_the_chosen_one() -> None:
    found = row([ASK], settings(VOTE, HOT), script=one_of("1", "22"))
    chosen = next(s for s in found["samples"] if s["text"] == found["text"])
    assert found["scores"] == chosen["scores"]
    assert {s["scores"]["tokens"] for s in found["samples"]} == {2, 3}
    assert found["scores"].keys() == Scores.__dataclass_fields__.keys()
    assert found["scores"]["answer_entropy"] is not None


def test_a_votes_confidence_is_the_share_that_agrees() -> None:
    found = row([ASK], settings(VOTE, HOT), script=one_of("1", "2"))
    assert found["confidence"] == pytest.approx(found["votes"] / 6, abs=1e-6)
    assert (found["confidence_from"], found["calibrated"]) == (METHOD, False)
    lost = row([ASK], settings(VOTE, HOT), script=one_of("none", "or"))
    assert (lost["answer"], lost["confidence"], lost["confidence_from"]) == (None, 0.0, METHOD)


def calibration(how: Any, score: str = FREE, curve: Any = None) -> Calibration:
    curve = curve or Platt(1.0, 0.5, 0.01, 0.99)
    return Calibration(subject_of("fake", how.method, how.plan), score, curve)


@pytest.mark.parametrize("score", RANKED)
def test_a_calibration_begins_with_its_score(score: str) -> None:
    plain = settings(params=HOT)
    made = calibration(plain, score)
    found = row([ASK], replace(plain, calibration=made))
    raw = RANKED[score](Scores(**found["scores"]))
    assert found["confidence"] == pytest.approx(made.curve(raw), abs=1e-5)
    assert (found["confidence_from"], found["calibrated"]) == (score, True)


def test_a_lines_own_settings_are_not_what_was_calibrated() -> None:
    plain = settings(params=HOT)
    how = replace(plain, calibration=calibration(plain))
    hot, cold = rows([{"prompt": "a"}, {"prompt": "a", "temperature": 0.5}], how)
    assert (hot["calibrated"], cold["calibrated"]) == (True, False)
    assert cold["confidence"] == pytest.approx(
        calibration(plain).curve(cold["scores"]["mean_log_probability"]), abs=1e-5
    )


def test_what_the_calibration_lacks_is_said_raw() -> None:
    plain = settings(params=HOT)
    found = row([ASK], replace(plain, calibration=calibration(plain, METHOD)))
    assert (found["confidence_from"], found["calibrated"]) == (FREE, False)
    assert found["confidence"] == pytest.approx(math.exp(found["scores"]["mean_log_probability"]), abs=1e-5)


def abstaining(least: float, **more: Any) -> tuple[list[Row], Any]:
    running = batch(LINES, settings(VOTE, HOT, abstain_below=least, **more), script=one_of("1", "2", "3"))
    return sorted(running.rows(), key=lambda r: r.get("custom_id")), running.tally


def test_answers_below_are_withheld_and_counted() -> None:
    found, tally = abstaining(0.6)
    plain = {r["custom_id"]: r for r in rows(LINES, settings(VOTE, HOT), script=one_of("1", "2", "3"))}
    assert 0 < tally.abstained < 8
    assert tally.abstained == sum(r["abstained"] for r in found)
    for each in found:
        same = plain[each["custom_id"]]
        assert each["abstained"] is (same["confidence"] < 0.6)
        if each["abstained"]:
            assert (each["text"], each["answer"]) == (None, None)
            assert each["withheld"] == {"text": same["text"], "answer": same["answer"]}
            assert each["samples"] == same["samples"]
        else:
            assert "withheld" not in each
            assert (each["text"], each["answer"]) == (same["text"], same["answer"])


@pytest.mark.parametrize(("least", "withheld"), [(0.0, 0), (1.0, 8)])
def test_at_the_ends_none_or_all_are_withheld(least: float, withheld: int) -> None:
    found, tally = abstaining(least)
    assert tally.abstained == withheld
    assert all(("abstained" in r) for r in found)
    assert "abstained" not in row([ASK], settings(VOTE, HOT), script=one_of("1", "2"))


def test_openais_form_has_no_content_for_what_is_withheld() -> None:
    found, _ = abstaining(1.0, openai=True)
    body = found[0]["response"]["body"]
    contents = [choice["message"]["content"] for choice in body["choices"]]
    assert contents.count(None) == 1
    assert body["emlocal"]["abstained"] is True
    assert body["emlocal"]["withheld"]["text"] in "123"
    assert body["emlocal"]["answer"] is None
    assert body["emlocal"]["scores"]["tokens"] == 2
    kept, _ = abstaining(0.0, openai=True)
    assert None not in [c["message"]["content"] for c in kept[0]["response"]["body"]["choices"]]


def test_a_mismatch_names_what_differs(tmp_path: Path) -> None:
    how = settings(VOTE, HOT)
    made = replace(calibration(how, METHOD, Isotonic(((0.0, 0.1), (1.0, 0.9)))), path="votes.json")
    assert made.mismatch(subject_of("fake", VOTE, how.plan)) is None
    other = settings(Chosen("greedy"))
    text = made.mismatch(subject_of("model b", other.method, other.plan))
    assert text == (
        "votes.json was fitted on other answers (model fake, not model b; method self-consistency,"
        " not greedy;"
        " samples 6, not 1; drawn T 1, EM off, majority of 6, not T 0, EM off); rows say calibrated false"
    )
    made.write(tmp_path / "votes.json")
    assert json.loads((tmp_path / "votes.json").read_text())["method"] == "self-consistency"
