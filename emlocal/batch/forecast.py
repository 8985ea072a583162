"""What a batch will take: its tokens, and the speed of this machine.

More sequences at once are faster until the processor, not the memory, is the limit. A survey checks each
line, counts its tokens and estimates the time, without answering.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from emlocal.backends.base import Backend, Feed
from emlocal.batch.lines import BadLine, Item
from emlocal.batch.run import Batch, BatchSettings
from emlocal.generation import Scheduler
from emlocal.generation.scheduler import SPARE_SEQUENCES

ENOUGH = 0.95
"""Share of the best speed that is enough.

`best_parallel` takes the fewest sequences that reach it, which need the least memory.
"""
_FALLING = 0.7  # share of the best speed; after two numbers below it, more will not help
_STEPS = 2  # timed for each number, after one that is not timed


class Speed(NamedTuple):
    """Measured speed of decoding this many sequences at once."""

    sequences: int
    tokens_per_second: float


def measure_parallel(backend: Backend, most: int, *, seconds: float = 4.0) -> list[Speed]:
    """Decodes a few tokens with 1, 2, 4, … `most` sequences; stops when more do not help or time is up."""
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
            times = [_timed(backend, feeds) for _ in range(_STEPS)]
            speeds.append(Speed(n, n / min(times)))  # the others were disturbed by other programs
            fastest = max(s.tokens_per_second for s in speeds)
            falling = all(s.tokens_per_second < _FALLING * fastest for s in speeds[-2:])
            if n == most or falling or time.perf_counter() - started + 2 * sum(times) > seconds:
                return speeds
            n = min(2 * n, most)
    finally:
        for sequence in open_sequences:
            backend.release(sequence)


def best_parallel(speeds: list[Speed]) -> int:
    """Returns the fewest sequences that are nearly as fast as the fastest."""
    fastest = max(speed.tokens_per_second for speed in speeds)
    return min(s.sequences for s in speeds if s.tokens_per_second >= ENOUGH * fastest)


_PROBE_TOKENS = 128  # read twice, to time the reading of prompts
_SHOWN = 10  # most bad lines to show


@dataclass
class Survey:
    """What a batch would do, in tokens and seconds."""

    lines: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    """(line number, error) of the first few."""
    bad_lines: int = 0
    refused: int = 0
    """Prompts that do not fit the context."""
    may_be_cut_off: int = 0
    """Prompts that leave room for fewer than --max-tokens tokens."""
    prompts: Counter[int] = field(default_factory=Counter)
    """Number of prompts by length in tokens, so that a million lines take no memory."""
    most_generated: int = 0
    """Tokens, if every answer reaches its limit."""
    reading_seconds: float = 0.0
    longest_seconds: float = 0.0
    """Time for reading, and for answers that all reach their limit."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts that fit."""
        return sum(length * n for length, n in self.prompts.items())

    def quantile(self, q: float) -> int:
        """Returns the prompt length that a share q of the prompts does not exceed."""
        left = q * sum(self.prompts.values())
        for length in sorted(self.prompts):
            left -= self.prompts[length]
            if left <= 0:
                return length
        return max(self.prompts, default=0)


def survey(
    backend: Backend,
    lines: Iterable[Item | BadLine],
    settings: BatchSettings,
    *,
    speed: Speed,
    progress: Callable[[int], None] = lambda lines: None,
) -> Survey:
    """Checks every line as a run would. Revisions of sequential refinement are not counted."""
    found = Survey()
    batch = Batch(backend, lines, settings, runner=Scheduler(backend, speed.sequences))
    for task, prompt in batch.questions():
        found.lines += 1
        progress(found.lines)
        if task.too_long:
            found.refused += 1
            continue
        if task.error or task.plan is None:
            found.bad_lines += 1
            if len(found.bad) < _SHOWN:
                found.bad.append((task.line, task.error))
            continue
        room = backend.context - len(prompt)
        if room < 1:
            found.refused += 1
            continue
        found.prompts[len(prompt)] += 1
        found.may_be_cut_off += room < task.plan.max_tokens
        found.most_generated += min(room, task.plan.max_tokens) * task.plan.samples
    found.reading_seconds = found.prompt_tokens / _reading_speed(backend)
    found.longest_seconds = found.reading_seconds + found.most_generated / speed.tokens_per_second
    return found


def _reading_speed(backend: Backend) -> float:
    """Measures the speed of reading prompts, in tokens a second."""
    tokens = [i % backend.info.vocabulary for i in range(100, 100 + min(_PROBE_TOKENS, backend.context))]
    sequence = backend.open()
    seconds = []
    try:
        for _ in range(2):
            backend.trim(sequence, 0)
            seconds.append(_timed(backend, [Feed(sequence, tokens, wanted=False)]))
    finally:
        backend.release(sequence)
    return len(tokens) / max(statistics.fmean(seconds), 1e-9)


def _timed(backend: Backend, feeds: Sequence[Feed]) -> float:
    """Returns the seconds of a pass."""
    started = time.perf_counter()
    backend.forward(feeds)
    return time.perf_counter() - started
