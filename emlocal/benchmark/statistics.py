"""Medians of paired ratios, with intervals that assume no distribution."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """How one way of doing the same work compares with another, over pairs."""

    median: float
    low: float
    """Ends of the 95 % interval of the median; for fewer than six pairs the least and the largest ratio."""
    high: float
    n: int
    """Pairs."""

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def speed_ratio(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """The speed of the first relative to the reference: above 1 is faster. Pairs belong together by index."""
    return ratio([r / s for s, r in zip(seconds, reference, strict=True)])


def ratio(pairs: Sequence[float]) -> Ratio:
    """The median of ratios, with its interval."""
    ordered = sorted(pairs)
    n = len(ordered)
    skip = _ranks_outside(n)
    return Ratio(statistics.median(ordered), ordered[skip], ordered[n - 1 - skip], n)


def _ranks_outside(n: int) -> int:
    """How many of n ordered values lie outside each end of the median's interval (binomial, exact)."""
    tail, skip = 0.0, 0
    while skip < n // 2:
        tail += math.comb(n, skip) / 2**n  # P(no more than `skip` values lie below the median)
        if tail > (1 - CONFIDENCE) / 2:
            break
        skip += 1
    return max(0, skip - 1)
