"""The decode loop: one prompt, one or more samples of it side by side, as a stream of events.

The generator keeps one sequence as a cache of what it has read, so that the next prompt that begins alike
(a chat turn, a regenerated answer) is only read from where it differs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from emlocal.backends.base import Backend, Feed
from emlocal.errors import ContextFullError
from emlocal.generation.sample import Completion, FinishReason, Piece, Request, Sample, check_prompt


@dataclass
class Timings:
    """What a call of `Generator.run` took. Seconds and tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's tokens, those that were held already."""
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    """Of all samples."""
    generation_seconds: float = 0.0


Event = Piece | Completion
_never: Callable[[], bool] = lambda: False  # noqa: E731


class Generator:
    """Runs prompts on a backend. Not for use from two threads at once."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.timings = Timings()
        """Of the current or last call of `run`."""
        self._root = backend.open()
        self._held: list[int] = []  # the tokens of the root sequence

    def run(
        self,
        prompt: Sequence[int],
        requests: Sequence[Request],
        cancelled: Callable[[], bool] = _never,
    ) -> Iterator[Event]:
        """Yield the pieces of all samples as they are drawn, and each sample's Completion at its end.

        One sample runs in the root sequence, so that what it says is part of the cache; several run in
        forks of it.

        Raises:
            UsageError: an empty prompt.
            ContextFullError: the prompt does not leave room for a single token.
            CancelledError: `cancelled()` became true while the prompt was read.
        """
        timings = self.timings = Timings(prompt_tokens=len(prompt))
        started = time.perf_counter()
        self._read(prompt, cancelled)
        timings.prompt_seconds = time.perf_counter() - started
        samples = [Sample(i, request, prompt) for i, request in enumerate(requests)]
        forks: list[int] = []
        started = time.perf_counter()
        try:
            draws = self.backend.sample([sample.row(self._root) for sample in samples])
            for sample in samples:
                sample.sequence = self._root if len(samples) == 1 else self.backend.fork(self._root)
                forks += [sample.sequence] if len(samples) > 1 else []
            running = samples
            while True:
                for sample, draw in zip(running, draws, strict=True):
                    timings.generated_tokens += 1
                    timings.generation_seconds = time.perf_counter() - started
                    yield sample.accept(draw, self.backend)
                    if sample.done:
                        yield sample.completion
                running = [sample for sample in running if not sample.done]
                if not running:
                    return
                if cancelled():
                    yield from self._end(running, "cancelled")
                    return
                if not self._step(running):
                    yield from self._end(running, "context")
                    return
                draws = self.backend.sample([sample.row(sample.sequence) for sample in running])
        finally:
            for fork in forks:
                self.backend.release(fork)

    def _read(self, prompt: Sequence[int], cancelled: Callable[[], bool]) -> None:
        """Bring the root sequence to exactly this prompt, reusing what it holds."""
        check_prompt(prompt, self.backend.context)
        common = 0
        for ours, theirs in zip(self._held, prompt, strict=False):
            if ours != theirs:
                break
            common += 1
        # the last token is always read again: its logits are needed
        kept = self.backend.trim(self._root, min(common, len(prompt) - 1))
        self.timings.cached_tokens = kept
        self._held = list(prompt[:kept])
        try:
            self.backend.forward([Feed(self._root, prompt[kept:])], cancelled)
            self._held = list(prompt)
        finally:
            del self._held[self.backend.length(self._root) :]

    def _step(self, running: Sequence[Sample]) -> bool:
        """Feed each sample its last token; False where there is no room for them."""
        try:
            self.backend.forward([Feed(s.sequence, s.completion.tokens[-1:]) for s in running])
        except ContextFullError:
            return False
        if running[0].sequence == self._root:
            self._held.append(running[0].completion.tokens[-1])
        return True

    def _end(self, running: Sequence[Sample], reason: FinishReason) -> Iterator[Event]:
        for sample in running:
            sample.end(reason)
            yield sample.completion

    @property
    def sequence(self) -> int:
        """The sequence that is the cache."""
        return self._root

    @property
    def held(self) -> int:
        """Tokens in the cache."""
        return len(self._held)

    def forget(self) -> None:
        """Drop what the cache holds."""
        self.backend.trim(self._root, 0)
        self._held = []
