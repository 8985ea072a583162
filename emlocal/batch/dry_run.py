"""What a batch would be, without running it: each line checked, its tokens counted, the time estimated."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from emlocal.backends.base import Backend, Feed
from emlocal.batch.lines import BadLine, Item
from emlocal.batch.run import Batch, BatchSettings
from emlocal.generation import Scheduler
from emlocal.generation.parallel import Speed

_PROBE_TOKENS = 128  # read once, to time the reading of prompts
_SHOWN = 10  # bad lines that are shown


@dataclass
class Survey:
    """What the lines ask for. Tokens and seconds."""

    lines: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    """(line, what is wrong), the first few."""
    bad_lines: int = 0
    refused: int = 0
    """Prompts that do not fit the context."""
    may_be_cut_off: int = 0
    """Prompts after which less than --max-tokens fit."""
    prompts: Counter[int] = field(default_factory=Counter)
    """Prompt lengths; a count per length, so that a million lines take no memory."""
    most_generated: int = 0
    """Tokens, if every answer is as long as it may be."""
    reading_seconds: float = 0.0
    longest_seconds: float = 0.0
    """Reading, and answers as long as they may be."""

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts that fit."""
        return sum(length * n for length, n in self.prompts.items())

    def quantile(self, q: float) -> int:
        """The prompt length that a share q of the prompts does not exceed."""
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
    """Check every line as a run would; revisions of refinement are not counted."""
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
    """Prompt tokens a second."""
    tokens = [i % backend.info.vocabulary for i in range(100, 100 + min(_PROBE_TOKENS, backend.context))]
    sequence = backend.open()
    seconds = []
    try:
        for _ in range(2):
            backend.trim(sequence, 0)
            started = time.perf_counter()
            backend.forward([Feed(sequence, tokens, wanted=False)])
            seconds.append(time.perf_counter() - started)
    finally:
        backend.release(sequence)
    return len(tokens) / max(statistics.fmean(seconds), 1e-9)
