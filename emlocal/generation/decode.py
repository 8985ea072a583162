"""The decode loop: one prompt, one or more samples of it side by side, as a stream of events.

The generator keeps one sequence as a cache of what it has read, so that the next prompt that begins alike
(a chat turn, a regenerated answer) is only read from where it differs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from emlocal.backends.base import Backend, Feed, Row
from emlocal.errors import ContextFullError, UsageError
from emlocal.generation.text import TextStream
from emlocal.sampling import Draw, SamplingParams, Uniforms

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""An end token or stop string; --max-tokens; the context is full; Ctrl-C."""


@dataclass(frozen=True)
class Request:
    """One sample to be drawn from a prompt."""

    params: SamplingParams
    uniforms: Uniforms
    max_tokens: int
    stop: tuple[str, ...] = ()


class Piece(NamedTuple):
    """One token of one sample, and the text that it made certain (maybe none, maybe more than its own)."""

    sample: int
    draw: Draw
    text: str


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


@dataclass
class Completion:
    """One finished sample."""

    sample: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    """Without the end token."""
    draws: list[Draw] = field(default_factory=list)
    """One a token, the end token's included."""
    finish_reason: FinishReason = "length"
    stop: str | None = None
    """The stop string that ended it, if one did."""
    tail: str = ""
    """The end of `text` that was held back until now and came with no Piece."""


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
        samples = [_Sample(i, request, prompt) for i, request in enumerate(requests)]
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
        if not prompt:
            raise UsageError("the prompt is empty", "give some text as an argument, with -f FILE or on stdin")
        if len(prompt) >= self.backend.context:
            raise ContextFullError(
                f"the prompt has {len(prompt):,} tokens; the context holds {self.backend.context:,},"
                " one of them for the answer",
                "shorten the prompt or give a larger --context",
            )
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

    def _step(self, running: Sequence["_Sample"]) -> bool:
        """Feed each sample its last token; False where there is no room for them."""
        try:
            self.backend.forward([Feed(s.sequence, s.completion.tokens[-1:]) for s in running])
        except ContextFullError:
            return False
        if running[0].sequence == self._root:
            self._held.append(running[0].completion.tokens[-1])
        return True

    def _end(self, running: Sequence["_Sample"], reason: FinishReason) -> Iterator[Event]:
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


class _Sample:
    """One sample on its way."""

    def __init__(self, index: int, request: Request, prompt: Sequence[int]) -> None:
        self.request = request
        self.completion = Completion(index)
        self.sequence = -1
        self.done = False
        self._text = TextStream(request.stop)
        # kept only where penalties look at it
        self._seen = list(prompt) if request.params.penalizes else []

    def row(self, sequence: int) -> Row:
        """What to draw next, from the given sequence's logits."""
        u = self.request.uniforms[len(self.completion.draws)]
        return Row(sequence, self.request.params, u, self._seen)

    def accept(self, draw: Draw, backend: Backend) -> Piece:
        """Take a drawn token in; `done` says whether it was the last."""
        completion = self.completion
        completion.draws.append(draw)
        if draw.token in backend.info.end_tokens:
            self.end("stop")
            return Piece(completion.sample, draw, "")
        completion.tokens.append(draw.token)
        if self.request.params.penalizes:
            self._seen.append(draw.token)
        text = self._text.push(backend.token_bytes(draw.token))
        completion.text += text
        if self._text.stopped_by is not None:
            completion.stop = self._text.stopped_by
            self.end("stop")
        elif len(completion.tokens) >= self.request.max_tokens:
            self.end("length")
        return Piece(completion.sample, draw, text)

    def end(self, reason: FinishReason) -> None:
        """Close the sample; text that was held back comes with its Completion."""
        self.done = True
        self.completion.finish_reason = reason
        self.completion.tail = self._text.finish()
        self.completion.text += self.completion.tail
