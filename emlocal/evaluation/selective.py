"""How well a score separates right answers from wrong ones, and the risk at each coverage.

Ties are broken at random, and the figures are the mean over all orders. So a score with few values (the votes
of eight) is neither favoured nor penalised. Intervals are bootstrap percentiles that resample whole problems,
because answers to one problem are not independent. All randomness is a Philox stream of the seed.

Sources: risk and coverage, El-Yaniv and Wiener 2010; AUROC as the probability that a right answer scores
above a wrong one, Mann and Whitney 1947; bins of equal mass, Nguyen and O'Connor 2015.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from emlocal.evaluation.statistics import CONFIDENCE, Interval

Array = NDArray[np.float64]
COVERAGES = tuple(i / 10 for i in range(1, 11))
"""Shares of the questions that are answered."""
BINS = 10
RESAMPLES = 1_000
_CHUNK = 1 << 22  # numbers held at once


@dataclass(frozen=True)
class Selection:
    """Figures of a score on judged answers."""

    auroc: float | None
    """Probability that a right answer scores above a wrong one; None if all are right, or none is."""
    auroc_interval: Interval | None
    risks: tuple[float, ...]
    """Share of wrong answers among the most confident, for each of `COVERAGES`."""
    risk_intervals: tuple[Interval, ...]


def select(
    scores: Sequence[float], right: Sequence[bool], problems: Sequence[Hashable], seed: int = 0
) -> Selection:
    """Computes a score's figures with their intervals.

    Args:
        scores: of each answer; greater means more confident.
        right: whether each answer is right.
        problems: the problem of each answer; resampling draws these.
    Raises ValueError if there are no answers.
    """
    groups = _Groups(scores, right)
    once = np.ones((1, len(groups.right)))
    auroc, risks = (figure[0] for figure in groups.figures(once))
    drawn = [groups.figures(weights) for weights in _resamples(groups.order, problems, seed)]
    aurocs, many = (np.concatenate(each) for each in zip(*drawn, strict=True))
    ends = 100 * np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    known = aurocs[~np.isnan(aurocs)]
    interval = (
        None if np.isnan(auroc) or not known.size else Interval(*map(float, np.percentile(known, ends)))
    )
    lows, highs = np.percentile(many, ends, axis=0)
    return Selection(
        None if np.isnan(auroc) else float(auroc),
        interval,
        tuple(map(float, risks)),
        tuple(Interval(float(low), float(high)) for low, high in zip(lows, highs, strict=True)),
    )


def auroc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """Returns the probability that a right answer scores above a wrong one; equal scores count half.

    Returns None if all are right, or none is. Raises ValueError if there are no answers.
    """
    groups = _Groups(scores, right)
    value = groups.figures(np.ones((1, len(groups.right))))[0][0]
    return None if np.isnan(value) else float(value)


def risks(scores: Sequence[float], right: Sequence[bool]) -> tuple[float, ...]:
    """Returns, for each of `COVERAGES`, the share of wrong answers among the most confident.

    If the coverage is not a whole number of answers, a fraction of the last one counts. Raises ValueError if
    there are no answers.
    """
    groups = _Groups(scores, right)
    return tuple(map(float, groups.figures(np.ones((1, len(groups.right))))[1][0]))


def calibration_error(p: Sequence[float], right: Sequence[bool], bins: int = BINS) -> float:
    """Returns the expected calibration error over bins of equally many answers.

    It is the mean distance between a bin's mean confidence and its share of right answers. An answer between
    two bins counts partly in both.

    The error is never negative, so with few answers it is above 0 by chance alone. Raises ValueError if there
    are no answers.
    """
    x, y = _checked(p, right)
    values, starts = np.unique(x, return_index=True)  # ascending; the order of the sorted answers
    order = np.argsort(x, kind="stable")
    starts = np.searchsorted(x[order], values)
    counts = np.diff([*starts, x.size])
    hits = np.add.reduceat(y[order], starts)
    mass = np.concatenate(([0.0], np.cumsum(counts)))
    bins = min(bins, x.size)
    borders = x.size * np.arange(bins + 1) / bins
    sums = [
        np.diff(np.interp(borders, mass, np.concatenate(([0.0], np.cumsum(each)))))
        for each in (hits, values * counts)
    ]
    return float(np.sum(np.abs(sums[0] - sums[1])) / x.size)


def brier(p: Sequence[float], right: Sequence[bool]) -> float:
    """Returns the mean squared difference between confidence and 1 (right) or 0 (wrong).

    Raises ValueError if there are no answers.
    """
    x, y = _checked(p, right)
    return float(np.mean((x - y) ** 2))


def _checked(scores: Sequence[float], right: Sequence[bool]) -> tuple[Array, Array]:
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if x.size == 0 or x.shape != y.shape or np.isnan(x).any():
        raise ValueError(f"{x.size} scores and {y.size} verdicts cannot be evaluated")
    return x, y


class _Groups:
    """Answers in descending order of score, grouped by equal score."""

    def __init__(self, scores: Sequence[float], right: Sequence[bool]) -> None:
        x, y = _checked(scores, right)
        self.order = np.argsort(-x, kind="stable")
        self.right = y[self.order]
        ordered = x[self.order]
        self._starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))

    def figures(self, weights: Array) -> tuple[Array, Array]:
        """Returns (AUROCs, risks by coverage) for each row of `weights`, shape (rows, answers in `order`)."""
        hits = np.add.reduceat(weights * self.right, self._starts, axis=1)
        misses = np.add.reduceat(weights, self._starts, axis=1) - hits
        return self._aurocs(hits, misses), self._risks(hits, misses)

    def _aurocs(self, hits: Array, misses: Array) -> Array:
        """Returns one AUROC for each row; NaN if all are right, or none is."""
        below = misses.sum(axis=1, keepdims=True) - np.cumsum(misses, axis=1)
        pairs = hits.sum(axis=1) * misses.sum(axis=1)
        won = np.sum(hits * (below + misses / 2), axis=1)
        found = np.full(len(won), np.nan)
        np.divide(won, pairs, out=found, where=pairs > 0)
        return found

    def _risks(self, hits: Array, misses: Array) -> Array:
        """Returns risks of shape (rows, coverages).

        Within a group of ties, right answers are spread evenly, which is the mean over random orders.
        """
        mass = np.cumsum(hits + misses, axis=1)
        wrong = np.cumsum(misses, axis=1)
        found = []
        for total, bad in zip(mass, wrong, strict=True):
            asked = total[-1] * np.array(COVERAGES)
            found.append(
                np.interp(asked, np.concatenate(([0.0], total)), np.concatenate(([0.0], bad))) / asked
            )
        return np.array(found)


def _resamples(order: NDArray[np.intp], problems: Sequence[Hashable], seed: int) -> Iterator[Array]:
    """Yields chunks of weights: rows that say how often each answer is drawn, in `order`."""
    names = {problem: i for i, problem in enumerate(dict.fromkeys(problems))}
    owner = np.array([names[problem] for problem in problems])[order]
    random = Generator(Philox(key=seed))
    rows = max(1, _CHUNK // len(owner))
    n = len(names)
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        drawn = random.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n)
        yield times[:, owner].astype(np.float64)
