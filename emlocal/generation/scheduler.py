"""Continuous batching: many prompts at once, each place going to the next as soon as it is free.

A step is one forward pass. It carries the next token of every sample that is being decoded, and beside them
the next part of prompts that are being read. A prompt's samples share its reading: the last token of the
prompt is fed to each sample as its first step, on a fork of the rest. What consecutive prompts begin with
alike (a system message, worked examples) is kept in a sequence of its own, the *root*, and read once.

Draws are addressed by request, sample and token, so what is said does not depend on who else is in the batch,
as far as the engine's arithmetic does not (docs/batch.md).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from emlocal.backends.base import Backend, Feed, Row
from emlocal.errors import CancelledError, ContextFullError, EmlocalError, LogitsError, UsageError
from emlocal.generation.sample import Completion, Request, Sample, check_prompt
from emlocal.sampling import Draw

Tag = TypeVar("Tag")

PROMPT_TOKENS_PER_STEP = 256
"""Of prompts being read, beside the samples being decoded."""
WORTH_SHARING = 16
"""Tokens that prompts must have in common for the root to hold them."""
SPARE_SEQUENCES = 2
"""Held beside the samples: the root, and a prompt whose samples have not all begun."""


@dataclass(frozen=True)
class Job(Generic[Tag]):
    """A prompt, and the samples to be drawn from it."""

    tag: Tag
    """The caller's own."""
    prompt: Sequence[int]
    requests: Sequence[Request]


@dataclass
class Finished(Generic[Tag]):
    """A job with all its samples, or with what went wrong."""

    job: Job[Tag]
    completions: list[Completion]
    error: EmlocalError | None = None
    cached_tokens: int = 0
    """Of the prompt's tokens, those that others had read already."""
    forward_passes: int = 0
    """In how many it took part, summed over its samples."""
    seconds: float = 0.0
    """From its admission to its end; others ran beside it."""


@dataclass
class Counters:
    """Of all jobs so far. Tokens and seconds."""

    steps: int = 0
    prompt_tokens: int = 0
    """Computed, not those that were shared."""
    generated_tokens: int = 0
    forward_seconds: float = 0.0
    reading_seconds: float = 0.0
    """Of these, in steps that read prompts."""
    sampling_seconds: float = 0.0


@dataclass
class _Group(Generic[Tag]):
    """A job being worked on."""

    job: Job[Tag]
    waiting: deque[Sample]
    """Samples that have not begun."""
    started: float
    sequence: int | None = None
    """Holds the prompt but for its last token, less `unread`. The last sample takes it over."""
    unread: Sequence[int] = ()
    cached: int = 0
    passes: int = 0
    completions: list[Completion] = field(default_factory=list)
    error: EmlocalError | None = None


@dataclass
class _Stream(Generic[Tag]):
    """A sample being decoded."""

    group: _Group[Tag]
    sample: Sample
    sequence: int
    next_token: int


class Scheduler(Generic[Tag]):
    """Runs jobs on a backend whose sequences each have room of their own (`LoadOptions.shared` off).

    One at a time also runs where they share it; an answer then ends when that is full. `parallel` samples
    are decoded at once at most; the backend must hold `SPARE_SEQUENCES` more. Not for use from two threads at
    once.
    """

    def __init__(self, backend: Backend, parallel: int) -> None:
        if not 1 <= parallel <= backend.max_sequences - SPARE_SEQUENCES:
            raise UsageError(
                f"{parallel} samples at once need {parallel + SPARE_SEQUENCES} sequences;"
                f" the backend holds {backend.max_sequences}"
            )
        self.backend = backend
        self.parallel = parallel
        self.counters = Counters()
        self._new: list[_Group[Tag]] = []  # admitted in this step, without a sequence as yet
        self._reading: list[_Group[Tag]] = []  # some samples have not begun
        self._streams: list[_Stream[Tag]] = []
        self._freed: list[int] = []  # sequences released since the last step
        self._root: int | None = None
        self._prefix: Sequence[int] = ()  # what the root holds
        self._previous: Sequence[int] = ()  # the prompt admitted last, less its last token

    def run(
        self, source: Callable[[], Job[Tag] | None], cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[Finished[Tag]]:
        """Work off the jobs that `source` gives, yielding each as it is finished.

        `source` is asked whenever there is a free place; None means that it has none at the moment, and
        the run ends when it has none and nothing is being worked on. A job that cannot be done is yielded
        with its error; the others go on.

        Raises CancelledError. Nothing is held afterwards.
        """
        # the first to be opened: engines like the numbers of those that are decoded to follow in order
        self._root = self.backend.open()
        try:
            while True:
                yield from self._admit(source, cancelled)
                self._attach()
                self._begin()
                self._close_ranks()
                if not self._streams and not self._reading:
                    return
                if cancelled():
                    raise CancelledError
                yield from self._step(cancelled)
        finally:
            self._release_all()

    def _admit(
        self, source: Callable[[], Job[Tag] | None], cancelled: Callable[[], bool]
    ) -> Iterator[Finished[Tag]]:
        """Take jobs while places are free; those that waiting samples will fill count as taken."""
        while len(self._streams) + sum(len(g.waiting) for g in (*self._reading, *self._new)) < self.parallel:
            job = source()
            if job is None:
                return
            error = self._refusal(job)
            if error is not None:
                yield Finished(job, [], error)
                continue
            samples = deque(Sample(i, request, job.prompt) for i, request in enumerate(job.requests))
            self._hold_common_prefix(job.prompt[:-1], cancelled)
            self._new.append(_Group(job, samples, time.perf_counter()))

    def _refusal(self, job: Job[Tag]) -> EmlocalError | None:
        try:
            check_prompt(job.prompt, self.backend.context)
        except (UsageError, ContextFullError) as error:
            return error
        return None if job.requests else UsageError("no samples are asked for")

    def _hold_common_prefix(self, tokens: Sequence[int], cancelled: Callable[[], bool]) -> None:
        """Bring into the root what this prompt and the one before it begin with, if that is much."""
        common, held = _common(self._previous, tokens), _common(self._prefix, tokens)
        self._previous = tokens
        if common < held + WORTH_SHARING:
            return
        donor = self._who_has_read(tokens[:common])
        if donor is not None:
            if self._root is not None:
                self.backend.release(self._root)
            self._root, held = self.backend.fork(donor), common
        elif self._root is None:
            self._root, held = self.backend.open(), 0  # it had been given up
        kept = self.backend.trim(self._root, held)
        if kept < common:
            self._forward([Feed(self._root, tokens[kept:common], wanted=False)], cancelled)
        self._prefix = tokens[:common]

    def _who_has_read(self, tokens: Sequence[int]) -> int | None:
        """A sequence that begins with these tokens."""
        held = [(group.sequence, group) for group in self._reading if group.sequence is not None]
        held += [(stream.sequence, stream.group) for stream in self._streams]
        for sequence, group in held:
            if self.backend.length(sequence) >= len(tokens) and _common(group.job.prompt, tokens) == len(
                tokens
            ):
                return sequence
        return None

    def _attach(self) -> None:
        """Give new jobs their sequence: a fork of the root as far as they agree, or an empty one."""
        for group in self._new:
            tokens = group.job.prompt[:-1]
            shared = _common(self._prefix, tokens)
            if self._root is None or shared < WORTH_SHARING:
                group.sequence = self.backend.open()
            else:
                group.sequence = self.backend.fork(self._root)
                group.cached = self.backend.trim(group.sequence, shared)
            group.unread = tokens[group.cached :]
        self._reading += self._new
        self._new = []

    def _begin(self) -> None:
        """Start samples of prompts that are read: on forks, the last one in the prompt's own sequence."""
        for group in self._reading:
            while not group.unread and group.waiting and len(self._streams) < self.parallel:
                assert group.sequence is not None
                last = len(group.waiting) == 1
                sequence = group.sequence if last else self.backend.fork(group.sequence)
                stream = _Stream(group, group.waiting.popleft(), sequence, group.job.prompt[-1])
                self._streams.append(stream)
        self._reading = [group for group in self._reading if group.waiting]

    def _close_ranks(self) -> None:
        """Move streams into places that nobody has taken: engines like numbers that follow in order.

        Without it the last samples of a run, with gaps between them, would take a pass each.
        """
        held = {stream.sequence for stream in self._streams}
        held |= {group.sequence for group in self._reading if group.sequence is not None}
        for gap in self._freed:
            last = max(self._streams, key=lambda stream: stream.sequence, default=None)
            if gap in held or last is None or last.sequence < gap:
                continue
            copy = self.backend.fork(last.sequence)
            if copy < last.sequence:
                last.sequence, copy = copy, last.sequence
            self.backend.release(copy)
        self._freed.clear()

    def _step(self, cancelled: Callable[[], bool]) -> Iterator[Finished[Tag]]:
        """One forward pass, and what it brings to an end."""
        feeds = [Feed(stream.sequence, (stream.next_token,)) for stream in self._streams]
        feeds += self._parts_of_prompts()
        try:
            self._forward(feeds, cancelled)
        except ContextFullError as error:
            yield from self._give_up(error)
            return
        started = time.perf_counter()
        draws = self._draw()
        self.counters.sampling_seconds += time.perf_counter() - started
        self.counters.generated_tokens += len(draws)
        going: list[_Stream[Tag]] = []
        ended: list[_Stream[Tag]] = []
        for stream, draw in zip(self._streams, draws, strict=True):
            (ended if self._is_over(stream, draw) else going).append(stream)
        self._streams = going
        # all of them, before anything is yielded: who listens may stop listening
        yield from [finished for stream in ended for finished in self._finish(stream)]

    def _give_up(self, error: ContextFullError) -> Iterator[Finished[Tag]]:
        """There is no room for another step: possible only where sequences share it."""
        ended, self._streams = self._streams, []
        unread, self._reading = self._reading, []
        for stream in ended:
            stream.sample.end("context")
        for group in unread:
            if group.sequence is not None:
                self.backend.release(group.sequence)
        yield from [finished for stream in ended for finished in self._finish(stream)]
        for group in unread:
            yield Finished(group.job, [], error, group.cached, group.passes)

    def _parts_of_prompts(self) -> list[Feed]:
        room, feeds = PROMPT_TOKENS_PER_STEP, []
        for group in self._reading:
            part = group.unread[:room]
            if part and group.sequence is not None:
                feeds.append(Feed(group.sequence, part, wanted=False))
                group.unread = group.unread[len(part) :]
                group.passes += 1
                room -= len(part)
        return feeds

    def _forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool]) -> None:
        started = time.perf_counter()
        try:
            self.backend.forward(feeds, cancelled)
        except ContextFullError:
            if self._root is None:
                raise
            self.backend.release(self._root)  # what nobody may need goes first
            self._root, self._prefix = None, ()
            self.backend.forward(feeds, cancelled)
        seconds = time.perf_counter() - started
        read = sum(len(feed.tokens) for feed in feeds if not feed.wanted)
        self.counters.steps += 1
        self.counters.forward_seconds += seconds
        self.counters.reading_seconds += seconds if read else 0
        self.counters.prompt_tokens += read

    def _draw(self) -> list[Draw | EmlocalError]:
        """A token for each stream. A row that is no distribution fails alone."""
        rows = [stream.sample.row(stream.sequence) for stream in self._streams]
        try:
            return list(self.backend.sample(rows))
        except (LogitsError, UsageError):
            return [self._draw_one(row) for row in rows]

    def _draw_one(self, row: Row) -> Draw | EmlocalError:
        try:
            return self.backend.sample([row])[0]
        except (LogitsError, UsageError) as error:  # the latter: a bias on a token that is not there
            return error

    def _is_over(self, stream: _Stream[Tag], draw: Draw | EmlocalError) -> bool:
        """Take a draw in; whether it was the stream's last."""
        stream.group.passes += 1
        if isinstance(draw, EmlocalError):
            stream.group.error = draw
            stream.sample.end("stop")
            return True
        stream.sample.accept(draw, self.backend)
        stream.next_token = draw.token
        if not stream.sample.done and self.backend.length(stream.sequence) >= self.backend.context:
            stream.sample.end("context")
        return stream.sample.done

    def _finish(self, stream: _Stream[Tag]) -> Iterator[Finished[Tag]]:
        """Free an ended stream's place; its job is yielded with the last of its samples."""
        group = stream.group
        self.backend.release(stream.sequence)
        self._freed.append(stream.sequence)
        group.completions.append(stream.sample.completion)
        if len(group.completions) < len(group.job.requests):
            return
        group.completions.sort(key=lambda completion: completion.sample)
        seconds = time.perf_counter() - group.started
        completions = [] if group.error else group.completions
        yield Finished(group.job, completions, group.error, group.cached, group.passes, seconds)

    def _release_all(self) -> None:
        held = [stream.sequence for stream in self._streams]
        held += [group.sequence for group in self._reading if group.sequence is not None]
        held += [] if self._root is None else [self._root]
        for sequence in held:
            self.backend.release(sequence)
        self._streams, self._reading, self._new, self._freed = [], [], [], []
        self._root, self._prefix, self._previous = None, (), ()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # often, and faster than to look at each
        return n
    return next((i for i in range(n) if a[i] != b[i]), n)
