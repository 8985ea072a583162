"""Calibrations: rising, never 0 or 1, near the truth, and equal after a round trip through their file."""

import json
import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.em.scores import RANKED
from emlocal.errors import EmlocalError, UsageError
from emlocal.evaluation.calibration import FOLDS, fit, folds, isotonic, platt
from emlocal.evaluation.confidence import Cases
from emlocal.methods.confidence import (
    FREE,
    METHOD,
    Calibration,
    Curve,
    Isotonic,
    Platt,
    Subject,
    read_calibration,
)
from tests.examples import examples

GREEDY = Subject("a model", "greedy", 1, "T 0, EM off")
LABELLED = st.lists(st.tuples(st.integers(-8, 8), st.booleans()), min_size=1, max_size=30)


def cases(raw: list[float], right: list[bool], *, own: bool = False, each: int = 1) -> Cases:
    """Makes cases in which every score is the same; `each`: answers to a problem."""
    problems = [f"p{i // each}" for i in range(len(raw))]
    return Cases(dict.fromkeys(RANKED, raw), raw, own, right, problems)


def curves(raw: list[float], right: list[bool]) -> list[Curve]:
    return [platt(raw, right), isotonic(raw, right)]


@examples(200)
@given(LABELLED)
def test_curves_rise_and_are_never_sure(labelled: list[tuple[int, bool]]) -> None:
    raw, right = [x / 2 for x, _ in labelled], [y for _, y in labelled]
    least = 0.5 / (len(raw) + 1)
    for curve in curves(raw, right):
        values = [curve(x / 4) for x in range(-40, 41)]
        assert all(a <= b + 1e-12 for a, b in pairwise(values))
        assert min(values) >= least - 1e-12
        assert max(values) <= 1 - least + 1e-12


@examples(200)
@given(LABELLED)
def test_isotonic_is_the_best_rising_step(labelled: list[tuple[int, bool]]) -> None:
    """Compares with the min-max formula of isotonic regression (Barlow et al. 1972).

    Half an answer of either kind is added.
    """
    raw, right = [x / 2 for x, _ in labelled], [y for _, y in labelled]
    values = sorted(set(raw))
    hits = [sum(y for x, y in zip(raw, right, strict=True) if x == v) for v in values]
    counts = [raw.count(v) for v in values]

    def share(i: int, j: int) -> Fraction:
        return Fraction(sum(hits[i : j + 1]), sum(counts[i : j + 1]))

    n = len(values)
    plain = [max(min(share(i, j) for j in range(k, n)) for i in range(k + 1)) for k in range(n)]
    members = {level: [k for k in range(n) if plain[k] == level] for level in plain}
    smoothed = [
        (sum(hits[k] for k in of) + 0.5) / (sum(counts[k] for k in of) + 1) for of in members.values()
    ]
    curve = isotonic(raw, right)
    found = [{curve(values[k]) for k in of} for of in members.values()]
    assert all(len(each) == 1 for each in found)  # pooled answers stay together
    if all(a < b for a, b in pairwise(smoothed)):
        assert [min(each) for each in found] == pytest.approx(smoothed)
    else:  # half an answer more moved small steps past their neighbours, so these were joined
        assert len({min(each) for each in found}) < len(found)


@pytest.mark.parametrize("kind", [platt, isotonic])
def test_a_known_chance_is_found(kind: object) -> None:
    random = np.random.default_rng(0)
    raw = [float(x) for x in random.uniform(-3, 3, 4000)]
    right = [bool(random.random() < 1 / (1 + math.exp(-(1.5 * x - 0.5)))) for x in raw]
    curve = kind(raw, right)  # type: ignore[operator]
    for x in (-2.5, -1.0, 0.0, 0.5, 1.0, 2.5):
        assert curve(x) == pytest.approx(1 / (1 + math.exp(-(1.5 * x - 0.5))), abs=0.06)


def test_platt_does_not_depend_on_the_unit_and_does_not_fall() -> None:
    raw = [0.1 * i for i in range(40)]
    right = [i % 3 > 0 if i > 15 else i % 4 == 0 for i in range(40)]
    one, other = platt(raw, right), platt([1000 * x - 5 for x in raw], right)
    assert one(1.7) == pytest.approx(other(1695.0), rel=1e-6)
    falling = platt(raw, [not y for y in right])
    assert isinstance(falling, Platt)
    assert falling.slope == 0
    assert falling(0) == pytest.approx((40 - sum(right) + 0.5) / 41)


@examples(50)
@given(st.lists(st.integers(0, 9), min_size=5, max_size=60), st.integers(0, 3))
def test_folds_part_the_answers_and_never_a_problem(numbers: list[int], seed: int) -> None:
    problems = [str(n) for n in numbers]
    left_out = []
    for inside, outside in folds(problems, seed):
        assert sorted(inside + outside) == list(range(len(problems)))
        assert not {problems[i] for i in inside} & {problems[i] for i in outside}
        left_out += outside
    if len(set(problems)) > 1:
        assert sorted(left_out) == list(range(len(problems)))
    assert len(folds(problems, seed)) <= FOLDS


def test_fit_takes_the_score_that_tells_most() -> None:
    random = np.random.default_rng(2)
    truth = random.random(300)
    right = [bool(random.random() < t) for t in truth]
    noise = {name: [float(x) for x in random.random(300)] for name in RANKED}
    known = {**noise, "window-entropy": [float(-t) ** 3 if t < 0 else float(t) for t in truth]}
    found = fit(Cases(known, noise[FREE], False, right, [str(i) for i in range(300)]), 0)
    assert found.score == "window-entropy"
    assert found.auroc is not None
    assert found.auroc > 0.75
    assert found.calibration_error < 0.12
    assert found.brier < 0.22


def test_what_is_reported_was_not_fitted_on() -> None:
    """On pure noise, the cross-fitted figures show that it is noise."""
    random = np.random.default_rng(3)
    noise = {name: [float(x) for x in random.random(200)] for name in RANKED}
    right = [bool(x < 0.4) for x in random.random(200)]
    found = fit(Cases(noise, noise[FREE], False, right, [str(i) for i in range(200)]), 0)
    assert found.auroc is not None
    assert abs(found.auroc - 0.5) < 0.1
    assert found.brier > 0.22


def test_a_methods_own_confidence_is_what_is_calibrated() -> None:
    raw = [0.2, 0.4, 0.6, 0.8] * 10
    found = fit(cases(raw, [x > 0.5 for x in raw], own=True), 0)
    assert found.score == METHOD
    assert found.curve(0.8) > 0.9 > 0.1 > found.curve(0.2)


def test_too_few_answers_are_refused() -> None:
    with pytest.raises(EmlocalError, match="needs 5 right and 5 wrong answers; here are 4 and 96"):
        fit(cases([0.5] * 100, [i < 4 for i in range(100)]), 0)


# -------------------------------------------------------------------------------------------------- its file


@pytest.mark.parametrize(
    "curve",
    [
        Platt(2.5, -1.25, 0.01, 0.99),
        Isotonic(((-3.0, 0.1), (-1.0, 0.1), (0.5, 0.7))),
        Isotonic(((0.0, 0.4),)),
    ],
)
def test_a_file_gives_the_same_calibration(tmp_path: Path, curve: Curve) -> None:
    path = tmp_path / "c.json"
    made = Calibration(GREEDY, "tail-entropy", curve, {"answers": 9}, {"auroc": 0.5}, str(path))
    made.write(path)
    read = read_calibration(path)
    assert read == made
    assert read.digest == made.digest
    assert Calibration(GREEDY, FREE, curve).digest != made.digest


def test_isotonic_between_and_beyond_its_knots() -> None:
    curve = Isotonic(((0.0, 0.2), (1.0, 0.4), (3.0, 0.8)))
    assert [curve(x) for x in (-9, 0, 0.5, 1, 2, 3, 9)] == pytest.approx([0.2, 0.2, 0.3, 0.4, 0.6, 0.8, 0.8])


WHOLE = {
    "format": "emlocal-calibration-1",
    "model": "m", "method": "greedy", "samples": 1, "drawn": "T 0", "score": "mean-entropy",
    "curve": {"kind": "platt", "slope": 1, "intercept": 0, "low": 0.1, "high": 0.9},
    "fitted_on": {}, "cross_fitted": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "emlocal-calibration-2"}, "not a calibration of this version"),
        ({"score": "magic"}, "there is no score 'magic'"),
        ({"method": 3}, "method is not a text"),
        ({"samples": "8"}, "'8' is not a number"),
        ({"curve": {"kind": "spline"}}, "no curve 'spline'"),
        ({"curve": {"kind": "platt", "slope": -1, "intercept": 0, "low": 0, "high": 1}}, "does not rise"),
        (
            {"curve": {"kind": "platt", "slope": 1, "intercept": math.inf, "low": 0, "high": 1}},
            "not a number",
        ),
        ({"curve": {"kind": "isotonic", "knots": []}}, "do not rise"),
        ({"curve": {"kind": "isotonic", "knots": [[0, 0.5], [1, 0.4]]}}, "do not rise"),
        ({"curve": {"kind": "isotonic", "knots": [[0, 0.5], [0, 0.6]]}}, "do not rise"),
        ({"curve": {"kind": "isotonic", "knots": [[0, -0.1], [1, 0.4]]}}, "do not rise"),
        ({"curve": {"kind": "isotonic", "knots": [[0]]}}, "damaged"),
        ({"curve": 3}, "damaged"),
        ({"fitted_on": 3}, "damaged"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(WHOLE | change))
    with pytest.raises(UsageError, match=says):
        read_calibration(path)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 10**5, b" " * (1 << 21), b"3"])
def test_what_is_no_calibration_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(raw)
    with pytest.raises(UsageError, match="is not a calibration"):
        read_calibration(path)
    with pytest.raises(UsageError, match="there is no file"):
        read_calibration(tmp_path / "other.json")
