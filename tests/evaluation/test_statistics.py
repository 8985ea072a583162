"""Statistics, compared with scipy, statsmodels and numbers worked by hand."""

import itertools
import math
import statistics

import numpy as np
import pytest
import scipy.stats
import statsmodels.stats.contingency_tables
import statsmodels.stats.multitest
import statsmodels.stats.proportion
from hypothesis import given
from hypothesis import strategies as st

from emlocal.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    holm,
    mcnemar,
    pass_at_k,
    sign_flip,
    wilson,
)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (1, 1), (37, 300), (299, 300), (659, 1319)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_that_of_statsmodels(right: int, n: int, confidence: float) -> None:
    found = wilson(right, n, confidence)
    low, high = statsmodels.stats.proportion.proportion_confint(right, n, 1 - confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_wilson_by_hand() -> None:
    # 5 of 10 at z = 1.96: 0.5 ± 1.96 / (1 + 0.38416) * sqrt(0.025 + 0.009604)
    found = wilson(5, 10)
    assert (found.low, found.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 7).low == 0
    assert wilson(7, 7).high == 1


@pytest.mark.parametrize(("right", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_wilson_refuses_what_is_no_share(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="not a share"):
        wilson(right, n)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(wins: int, losses: int) -> None:
    if wins + losses:
        table = [[5, wins], [losses, 9]]
        expected = statsmodels.stats.contingency_tables.mcnemar(table, exact=True).pvalue
        assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)
        binomial = scipy.stats.binomtest(wins, wins + losses).pvalue
        assert mcnemar(wins, losses) == pytest.approx(binomial, rel=1e-9)
    else:
        assert mcnemar(0, 0) == 1


def test_mcnemar_by_hand() -> None:
    assert mcnemar(5, 0) == 2 / 32
    assert mcnemar(1, 4) == 2 * (1 + 5) / 32
    assert mcnemar(3, 3) == 1


@pytest.mark.parametrize("n", range(1, 13))
def test_holm_is_that_of_statsmodels(n: int) -> None:
    p = np.random.default_rng(n).random(n) ** 3
    p[: n // 3] = p[-1]  # ties
    expected = statsmodels.stats.multitest.multipletests(p, method="holm")[1]
    assert holm(p.tolist()) == pytest.approx(expected.tolist())


def test_holm_of_nothing_is_nothing() -> None:
    assert holm([]) == []


def test_holm_by_hand() -> None:
    # sorted: 0.01 * 3, 0.02 * 2, 0.04 * 1; later values are never smaller
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (5, 2), (8, 8), (8, 0), (6, 5)])
def test_pass_at_k_counts_the_subsets(n: int, right: int) -> None:
    answers = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(answers, k))
        assert pass_at_k(n, right, k) == pytest.approx(statistics.fmean(map(any, subsets)))
    assert pass_at_k(n, right, 1) == pytest.approx(right / n)


@pytest.mark.parametrize(("n", "right", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_refuses_the_impossible(n: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, right, k)


@pytest.mark.parametrize(
    "values",
    [
        [1.0] * 12 + [0.0] * 60,
        [1.0] * 9 + [-1.0] * 4 + [0.0] * 70,
        np.random.default_rng(3).exponential(size=80).tolist(),
        [0.25, 0.5, 1.0, 0.0, 0.75] * 10,
    ],
)
def test_the_bootstrap_is_scipys_bca(values: list[float]) -> None:
    n = 100_000
    found = bootstrap_mean(values, seed=1, resamples=n)
    expected = scipy.stats.bootstrap(
        (np.array(values),), np.mean, n_resamples=n, batch=2000, rng=np.random.default_rng(5)
    ).confidence_interval
    width = expected.high - expected.low
    # both are random, and means of whole numbers are steps apart
    tolerance = 0.03 * width + 1.01 / len(values)
    assert found.low == pytest.approx(expected.low, abs=tolerance)
    assert found.high == pytest.approx(expected.high, abs=tolerance)


def test_the_bootstrap_is_a_function_of_its_seed() -> None:
    values = np.random.default_rng(3).exponential(size=40).tolist()
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_the_bootstrap_of_skewed_values_is_not_the_percentile_one() -> None:
    values = np.random.default_rng(3).exponential(size=40)
    found = bootstrap_mean(values.tolist(), seed=1)
    percentile = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.low > percentile.low
    assert found.high > percentile.high


def test_whole_questions_are_drawn() -> None:
    """Ten equal answers to each question count no more than one."""
    once = [1.0] * 6 + [0.0] * 14
    means_of_ten_alike = [statistics.fmean([v] * 10) for v in once]
    assert bootstrap_mean(means_of_ten_alike, seed=4) == bootstrap_mean(once, seed=4)
    independent = bootstrap_mean(once * 10, seed=4)
    clustered = bootstrap_mean(once, seed=4)
    assert clustered.high - clustered.low > 2.5 * (independent.high - independent.low)


def test_the_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(11)
    samples = random.random((400, 60)) < 0.3
    ends = [
        bootstrap_mean(row.astype(float).tolist(), seed=i, resamples=1000) for i, row in enumerate(samples)
    ]
    covered = statistics.fmean(end.low <= 0.3 <= end.high for end in ends)
    assert 0.91 <= covered <= 0.985


def test_without_spread_the_interval_is_a_point() -> None:
    assert bootstrap_mean([0.0] * 5) == Interval(0.0, 0.0)
    assert bootstrap_mean([0.25]) == Interval(0.25, 0.25)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])


def test_sign_flips_of_single_answers_are_mcnemars_test() -> None:
    assert sign_flip([1.0] * 7 + [-1.0] * 2 + [0.0] * 30) == mcnemar(7, 2)
    assert sign_flip([0.0, 0.0]) == 1
    assert sign_flip([]) == 1


def test_sign_flips_agree_with_all_of_them() -> None:
    differences = [0.5, 0.25, -0.25, 0.75, 1.0, -0.5, 0.25, 0.5, 0.25, 0.0]
    observed = abs(sum(differences))
    flips = itertools.product((-1, 1), repeat=len(differences))
    exact = statistics.fmean(
        abs(math.fsum(s * d for s, d in zip(f, differences, strict=True))) >= observed for f in flips
    )
    assert sign_flip(differences, seed=1, resamples=100_000) == pytest.approx(exact, abs=0.004)
    expected = scipy.stats.permutation_test(
        (np.array(differences), np.zeros(len(differences))),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
    ).pvalue
    assert exact == pytest.approx(expected)


def test_sign_flips_are_never_certain() -> None:
    p = sign_flip([0.5] * 200, seed=1, resamples=999)
    assert p == 1 / 1000


def test_clusters_of_one_size_are_their_means() -> None:
    random = np.random.default_rng(2)
    values = random.random(30)
    alone = bootstrap_mean(values.tolist(), seed=3)
    as_sums = bootstrap_mean((values * 4).tolist(), seed=3, sizes=[4] * 30)
    assert (as_sums.low, as_sums.high) == pytest.approx((alone.low, alone.high))


def test_clusters_of_several_sizes_are_scipys_ratio() -> None:
    random = np.random.default_rng(5)
    sizes = random.integers(1, 9, 40)
    sums = random.binomial(sizes, 0.4).astype(float)
    found = bootstrap_mean(sums.tolist(), seed=3, sizes=sizes.tolist())
    expected = scipy.stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        rng=np.random.default_rng(6),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.01)
