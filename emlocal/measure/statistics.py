"""Medians of paired ratios, with intervals that assume no distribution."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from emlocal.formatting import counted

CONFIDENCE = 0.95
_FEWEST_PAIRS = 6  # of five, even the least and the largest enclose the median with 93.75 % only


@dataclass(frozen=True)
class Ratio:
    """How one way of doing the same work compares with another, over pairs."""

    median: float
    low: float
    high: float
    n: int
    """Pairs."""
    bounds: Literal["95% interval", "range"]
    """What `low` and `high` are: the ends of the median's interval, or, where the pairs are too few for
    one, the least and the largest ratio."""

    def __str__(self) -> str:
        ends = f"{self.low:.3f} to {self.high:.3f}"
        if self.bounds == "range":
            return f"{self.median:.3f}  ({counted(self.n, 'round')}: {ends})"
        return f"{self.median:.3f}  (95 %: {ends}, {self.n} rounds)"


def speed_ratio(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """The speed of the first relative to the reference: above 1 is faster. Pairs belong together by index."""
    return ratio([r / s for s, r in zip(seconds, reference, strict=True)])


def ratio(pairs: Sequence[float]) -> Ratio:
    """The median of ratios, with its interval; with their range where they are too few for one."""
    ordered = sorted(pairs)
    n = len(ordered)
    skip = _ranks_outside(n)
    bounds: Literal["95% interval", "range"] = "range" if n < _FEWEST_PAIRS else "95% interval"
    return Ratio(statistics.median(ordered), ordered[skip], ordered[n - 1 - skip], n, bounds)


def _ranks_outside(n: int) -> int:
    """How many of n ordered values lie outside each end of the median's interval (binomial, exact)."""
    tail, skip = 0.0, 0
    while skip < n // 2:
        tail += math.comb(n, skip) / 2**n  # P(no more than `skip` values lie below the median)
        if tail > (1 - CONFIDENCE) / 2:
            break
        skip += 1
    return max(0, skip - 1)
