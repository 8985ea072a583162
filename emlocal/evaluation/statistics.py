"""Intervals and tests for accuracies over questions, single or paired.

The unit of resampling is a question. Several answers to one question are not independent, so they count as
the question's mean, and resampling draws whole questions. All randomness is a Philox stream of the seed.
Wilson's interval, the binomial test and BCa come from scipy, which is imported where it is needed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, Philox

CONFIDENCE = 0.95
RESAMPLES = 10_000
_CHUNK = 1 << 22  # random numbers held at once


@dataclass(frozen=True)
class Interval:
    """The ends of a confidence interval."""

    low: float
    high: float


def wilson(right: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Returns the Wilson score interval of a share, `right` of n independent answers.

    Unlike mean ± 2 s.e., it never leaves [0, 1], and it has a width even if all or none are right. Source:
    Wilson 1927. Raises ValueError unless 0 ≤ right ≤ n and n ≥ 1.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} of {n} is not a share")
    from scipy.stats import binomtest

    found = binomtest(right, n).proportion_ci(confidence, method="wilson")
    return Interval(float(found.low), float(found.high))


def bootstrap_mean(
    values: Sequence[float],
    seed: int = 0,
    *,
    sizes: Sequence[float] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Interval:
    """Returns the BCa interval of a mean over questions, or of a mean paired difference.

    If the units are clusters (problems with several steps), `values` are the clusters' sums and `sizes` their
    numbers of members. The interval is then that of the mean over members.

    BCa is bias-corrected and accelerated (Efron 1987), with the acceleration from the jackknife. If all means
    are equal, resampling changes nothing, and both ends are that value.

    Raises ValueError if there are no values.
    """
    x = np.asarray(values, dtype=np.float64)
    n = np.ones_like(x) if sizes is None else np.asarray(sizes, dtype=np.float64)
    if x.size == 0:
        raise ValueError("no values")
    observed = x.sum() / n.sum()
    if np.all(x == n * (x[0] / n[0])):
        return Interval(float(observed), float(observed))
    from scipy.stats import bootstrap

    found = bootstrap(
        (x, n),
        lambda sums, members, axis: sums.sum(axis=axis) / members.sum(axis=axis),
        paired=True,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, _CHUNK // x.size),
        method="BCa",
        rng=Generator(Philox(key=seed)),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def mcnemar(wins: int, losses: int) -> float:
    """Returns the two-sided p of the exact McNemar test.

    `wins` and `losses` count the questions that only one method, or only the other, got right. Questions on
    which both agree say nothing about which is better. Source: McNemar 1947, binomial form.
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def sign_flip(differences: Sequence[float], seed: int = 0, *, resamples: int = RESAMPLES) -> float:
    """Returns the two-sided p of Fisher's randomisation test of paired differences.

    The null hypothesis: each difference is positive or negative with equal probability. Differences of -1, 0
    and 1 give McNemar's exact test. Otherwise signs are drawn at random. The observed signs count as one
    draw, so p is never 0.
    """
    x = np.asarray([d for d in differences if d], dtype=np.float64)
    if set(x.tolist()) <= {-1.0, 1.0}:
        return mcnemar(int(np.sum(x > 0)), int(np.sum(x < 0)))
    random = Generator(Philox(key=seed))
    observed = abs(x.sum()) * (1 - 1e-12)  # equal sums in another order must count as equal
    rows = max(1, _CHUNK // x.size)
    extreme = 0
    for start in range(0, resamples, rows):
        signs = random.integers(2, size=(min(rows, resamples - start), x.size)) * 2 - 1
        extreme += int(np.sum(np.abs(signs @ x) >= observed))
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values adjusted for multiple tests, in their order.

    Each can be compared with the level by itself. The probability of any false finding stays below the level,
    however the tests depend on each other. Source: Holm 1979.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def pass_at_k(n: int, right: int, k: int) -> float:
    """Returns the probability that k answers, drawn from n of which `right` are right, contain a right one.

    Unbiased: 1 - C(n - right, k) / C(n, k). Source: Chen et al. 2021, eq. 1. Raises ValueError unless 0 ≤
    right ≤ n and 1 ≤ k ≤ n.
    """
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {right} right answers among {n}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)
