"""Risk, coverage, AUROC and calibration error compared with counting by hand, especially with ties."""

from fractions import Fraction
from itertools import permutations
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.evaluation.selective import COVERAGES, auroc, brier, calibration_error, risks, select
from tests.examples import examples

CASES = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6)
MORE = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=40)


def split(cases: list[tuple[int, bool]]) -> tuple[list[float], list[bool]]:
    return [x / 4 for x, _ in cases], [y for _, y in cases]


@examples(100)
@given(MORE)
def test_auroc_is_the_share_of_pairs_that_are_in_order(cases: list[tuple[int, bool]]) -> None:
    scores, right = split(cases)
    pairs = [
        (a, b)
        for a, y in zip(scores, right, strict=True)
        if y
        for b, z in zip(scores, right, strict=True)
        if not z
    ]
    if not pairs:
        assert auroc(scores, right) is None
        return
    assert auroc(scores, right) == pytest.approx(fmean((a > b) + (a == b) / 2 for a, b in pairs))


def by_lot(scores: list[float], right: list[bool], coverage: Fraction) -> float:
    """Returns the mean share of wrong answers over all orders of the answers, each of which breaks the ties.

    If the coverage ends within an answer, that answer counts in part.
    """
    found = []
    for order in permutations(range(len(scores))):
        ranked = sorted(order, key=lambda i: -scores[i])  # the sort is stable, so ties stay in this order
        asked = coverage * len(scores)
        whole = int(asked)
        wrong = Fraction(sum(not right[i] for i in ranked[:whole]))
        if whole < asked:
            wrong += (asked - whole) * (not right[ranked[whole]])
        found.append(float(wrong / asked))
    return fmean(found)


@examples(40)
@given(CASES)
def test_risks_are_those_of_all_ways_to_settle_ties(cases: list[tuple[int, bool]]) -> None:
    scores, right = split(cases)
    expected = [by_lot(scores, right, Fraction(i, 10)) for i in range(1, 11)]
    assert risks(scores, right) == pytest.approx(expected)


@examples(60)
@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.booleans()), min_size=10, max_size=60, unique_by=lambda c: c[0]
    )
)
def test_calibration_error_of_whole_bins_is_counted_by_hand(cases: list[tuple[int, bool]]) -> None:
    cases = cases[: len(cases) // 10 * 10]
    p, right = [x / 1000 for x, _ in cases], [y for _, y in cases]
    order = np.argsort(p)
    bins = np.split(order, 10)
    gaps = [abs(fmean(p[i] for i in each) - fmean(right[i] for i in each)) for each in bins]
    assert calibration_error(p, right) == pytest.approx(fmean(gaps))


@examples(60)
@given(MORE, st.randoms())
def test_the_order_of_the_answers_does_not_matter(cases: list[tuple[int, bool]], random: object) -> None:
    mixed = list(cases)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    for figure in (risks, calibration_error, auroc, brier):
        one, other = figure(*split(cases)), figure(*split(mixed))
        assert one == other if one is None else one == pytest.approx(other)


@examples(60)
@given(MORE)
def test_figures_of_rising_transformations_are_the_same(cases: list[tuple[int, bool]]) -> None:
    scores, right = split(cases)
    assert risks(scores, right) == pytest.approx(risks([x**3 - 7 for x in scores], right))
    assert auroc(scores, right) == auroc([np.exp(x) for x in scores], right)


def test_the_last_coverage_is_of_all() -> None:
    scores, right = [0.1, 0.2, 0.3, 0.9], [False, True, False, True]
    assert risks(scores, right)[-1] == 0.5
    assert risks(scores, right)[4] == 0.5  # the two most certain
    assert COVERAGES[4] == 0.5


def test_a_constant_score_knows_nothing() -> None:
    right = [True] * 3 + [False] * 7
    assert auroc([0.5] * 10, right) == 0.5
    assert risks([0.5] * 10, right) == pytest.approx([0.7] * 10)
    assert calibration_error([0.3] * 10, right) == pytest.approx(0)  # each bin has 0.3 of a right answer
    assert calibration_error([1.0] * 10, right) == pytest.approx(0.7)


@examples(20)
@given(MORE)
def test_intervals_hold_their_value_and_repeat_themselves(cases: list[tuple[int, bool]]) -> None:
    scores, right = split(cases)
    problems = list(range(len(cases)))
    found = select(scores, right, problems, seed=3)
    assert found == select(scores, right, problems, seed=3)
    assert found.auroc == auroc(scores, right)
    assert found.risks == risks(scores, right)
    assert all(0 <= each.low <= each.high <= 1 for each in found.risk_intervals)
    assert (found.auroc_interval is None) == (found.auroc is None)


def test_intervals_are_those_of_whole_problems() -> None:
    """Four equal answers each to a few problems tell no more than the few problems."""
    random = np.random.default_rng(0)
    scores = [float(x) for x in random.random(30)]
    right = [bool(random.random() < x) for x in scores]
    once = select(scores, right, list(range(30)))
    four = select(scores * 4, right * 4, list(range(30)) * 4)
    assert four.auroc == pytest.approx(once.auroc)
    assert once.auroc_interval is not None
    assert four.auroc_interval is not None
    assert four.auroc_interval.low == pytest.approx(once.auroc_interval.low)
    apart = select(scores * 4, right * 4, list(range(120)))
    assert apart.auroc_interval is not None
    assert apart.auroc_interval.low > once.auroc_interval.low


def test_an_interval_of_auroc_covers_the_truth() -> None:
    """Over 200 samples of 80 answers with a known AUROC, about 95 % of the intervals contain it."""
    random = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        right = random.random(80) < 0.5
        scores = random.normal(size=80) + right  # AUROC: P(N(1, √2) > 0)
        found = select(list(map(float, scores)), list(map(bool, right)), range(80), seed).auroc_interval
        assert found is not None
        held += found.low <= 0.7602 <= found.high
    assert 180 <= held <= 199


@pytest.mark.parametrize("figure", [auroc, risks, calibration_error, brier])
def test_no_answers_tell_nothing(figure: object) -> None:
    for scores, right in (([], []), ([0.5], [True, False]), ([float("nan")], [True])):
        with pytest.raises(ValueError, match="cannot be evaluated"):
            figure(scores, right)  # type: ignore[operator]
