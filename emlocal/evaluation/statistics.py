"""Intervals and tests for accuracies over questions, single or paired.

A question is the unit that is drawn: several answers to one question are not independent, so they enter as
the question's mean, and resampling draws whole questions. All randomness is a Philox stream of the seed.
Wilson's interval, the binomial test and BCa are scipy's, which is imported where they are needed.
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
    """The score interval of a share, `right` of n independent answers.

    Unlike mean ± 2 s.e. it never leaves [0, 1] and has a width where all or none are right.
    Source: Wilson 1927. Raises ValueError unless 0 ≤ right ≤ n and n ≥ 1.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} of {n} is no share")
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
    """The BCa interval of a mean over questions; of paired differences, if these are the values.

    Where what is drawn comes in clusters (problems of several steps), `values` are the clusters' sums and
    `sizes` their numbers of members, and the interval is of the mean over members.

    Bias-corrected and accelerated (Efron 1987), the acceleration by the jackknife. Where all means are
    equal there is nothing to resample, and both ends are that value.

    Raises ValueError for no values.
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
    """Two-sided p of the exact McNemar test: questions that one method alone got right, and the other alone.

    Questions on which both agree say nothing about which is better. Source: McNemar 1947, binomial form.
    """
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def sign_flip(differences: Sequence[float], seed: int = 0, *, resamples: int = RESAMPLES) -> float:
    """Two-sided p that paired differences are as likely of either sign (Fisher's randomization test).

    For differences of -1, 0 and 1 it is McNemar's test and exact; else signs are drawn at random, and the
    observed ones count as one draw, so that p is never 0.
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
    """The p-values adjusted for being many, in their order: each may be held against the level by itself.

    Source: Holm 1979. The chance of any false finding stays below the level, however the tests depend.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k answers drawn from a question's n, `right` of them right, hold a right one.

    Unbiased: 1 - C(n - right, k) / C(n, k). Source: Chen et al. 2021, eq. 1.
    Raises ValueError unless 0 ≤ right ≤ n and 1 ≤ k ≤ n.
    """
    if not 0 <= right <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {right} right answers among {n}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)
