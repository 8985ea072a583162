"""How many sequences to decode at once: more are faster until the processor, not the memory, is the limit."""

import time
from typing import NamedTuple

from emlocal.backends.base import Backend, Feed
from emlocal.generation.scheduler import SPARE_SEQUENCES

ENOUGH = 0.95
"""The fewest sequences that reach this share of the best speed are chosen: they need less memory."""
_FALLING = 0.7  # of the best speed: more sequences will not help. Two are often no faster than one.
_STEPS = 2  # timed for each number, after one that is not


class Speed(NamedTuple):
    """What so many sequences at once gave."""

    sequences: int
    tokens_per_second: float


def measure(backend: Backend, most: int, *, seconds: float = 4.0) -> list[Speed]:
    """Decode a few tokens of 1, 2, 4, … `most` sequences; stops where more do not help, or time is up."""
    started, speeds = time.perf_counter(), list[Speed]()
    most = min(most, backend.max_sequences - SPARE_SEQUENCES)
    token = min(100, backend.info.vocabulary - 1)
    open_sequences: list[int] = []
    n = 1
    try:
        while True:
            open_sequences += [backend.open() for _ in range(n - len(open_sequences))]
            feeds = [Feed(sequence, (token,)) for sequence in open_sequences]
            backend.forward(feeds)
            began = time.perf_counter()
            for _ in range(_STEPS):
                backend.forward(feeds)
            took = time.perf_counter() - began
            speeds.append(Speed(n, _STEPS * n / took))
            fastest = max(s.tokens_per_second for s in speeds)
            falling = speeds[-1].tokens_per_second < _FALLING * fastest
            if n == most or falling or time.perf_counter() - started + 2 * took > seconds:
                return speeds
            n = min(2 * n, most)
    finally:
        for sequence in open_sequences:
            backend.release(sequence)


def best(speeds: list[Speed]) -> int:
    """The fewest sequences that are nearly as fast as the fastest."""
    fastest = max(speed.tokens_per_second for speed in speeds)
    return min(s.sequences for s in speeds if s.tokens_per_second >= ENOUGH * fastest)
