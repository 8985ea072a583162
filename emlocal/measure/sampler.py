"""The sampler by itself, on rows of a real model: with EM, without, and against plain numpy.

Rows are visited one after the other, so that each comes from outside the processor's inner caches, as a row
does that an engine has just written; the ways take turns, sweep by sweep.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emlocal.measure.statistics import Ratio, speed_ratio
from emlocal.sampling import Sampler, SamplingParams, Uniforms

Rows = Sequence[NDArray[np.float32]]
_FULL = "full vocabulary"


@dataclass(frozen=True)
class Path:
    """Rows that the sampler treated alike with EM on."""

    name: str
    rows: int
    microseconds: float
    """Mean over the rows."""


@dataclass(frozen=True)
class SamplerTimes:
    """Mean microseconds a row (of each row the median over the sweeps): EM step, truncation and draw."""

    off: float
    on: float
    plain: float
    """Full-row softmax, cumulative sum and search in numpy: no EM, no truncation, no statistics."""
    plain_over_on: Ratio
    """How fast the sampler with EM is relative to plain numpy, over the sweeps; above 1 is faster."""
    paths: tuple[Path, ...]


def plain_sample(row: NDArray[np.float32], temperature: float, u: float) -> int:
    """What a few lines of numpy do: softmax over the whole row, cumulative sum, search."""
    p = np.exp((row - row.max()) / np.float32(temperature))
    cumulative = np.cumsum(p)
    return int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))


def measure_sampler(rows: Rows, params: SamplingParams, *, sweeps: int = 5, seed: int = 0) -> SamplerTimes:
    """Time the sampler on `rows`, each float32 [V]."""
    sampler = Sampler(len(rows[0]))
    without, heat = params.without_em(), params.temperature or 1.0
    uniforms = Uniforms(seed)
    draws = [uniforms[i] for i in range(len(rows))]
    ways: dict[str, Callable[[NDArray[np.float32], float], object]] = {
        "off": lambda row, u: sampler.sample(row, without, u),
        "on": lambda row, u: sampler.sample(row, params, u),
        "plain": lambda row, u: plain_sample(row, heat, u),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    names = list(ways)
    for sweep in range(-1, sweeps):  # the first warms up
        for name in names[sweep % 3 :] + names[: sweep % 3]:
            seconds = _sweep(rows, draws, ways[name])
            if sweep >= 0:
                times[name].append(seconds)
    each = {
        name: [statistics.median(s) * 1e6 for s in zip(*found, strict=True)] for name, found in times.items()
    }
    totals = {name: [sum(seconds) for seconds in found] for name, found in times.items()}
    return SamplerTimes(
        statistics.fmean(each["off"]),
        statistics.fmean(each["on"]),
        statistics.fmean(each["plain"]),
        speed_ratio(totals["on"], totals["plain"]),
        _paths(rows, draws, params, each["on"]),
    )


def _sweep(
    rows: Rows, draws: Sequence[float], way: Callable[[NDArray[np.float32], float], object]
) -> list[float]:
    seconds = []
    for row, u in zip(rows, draws, strict=True):
        started = time.perf_counter()
        way(row, u)
        seconds.append(time.perf_counter() - started)
    return seconds


def _paths(
    rows: Rows, draws: Sequence[float], params: SamplingParams, times: Sequence[float]
) -> tuple[Path, ...]:
    """The rows by what the sampler did with them."""
    found: dict[str, list[float]] = {}
    for row, u, microseconds in zip(rows, draws, times, strict=True):
        sampler = Sampler(len(row))
        draw = sampler.sample(row, params, u)
        (cutoff,) = sampler.paths
        name = f"head above {cutoff:g}" if cutoff else _FULL
        found.setdefault(name if draw.steps or not cutoff else "left alone by EM", []).append(microseconds)
    return tuple(Path(name, len(t), statistics.fmean(t)) for name, t in sorted(found.items()))
