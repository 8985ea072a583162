"""The runner over an engine of tokens: continuous batching.

A free place goes to the next sample at once. A step is one forward pass. It has the next token of every
sample that is being decoded, and the next part of prompts that are being read. A prompt's samples share its
reading: the last token of the prompt is fed to each sample as its first step, on a copy of the rest.

Nothing is read twice: a prompt starts from the longest beginning that a running or a kept sequence has
(`sequences`). In a `run`, prompts come one after the other. The common beginning of two of them is read
before both, into a sequence of its own, the *root*.

With `speculation`, a sample's feed goes on with guessed tokens. A guess is right if its row draws that very
token; the sequence is cut before the first wrong one (`speculation`).

Draws are addressed by request, sample and token. An answer therefore does not depend on the other samples in
the batch, as far as the engine's arithmetic does not (docs/batch.md).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from emlocal.backends.base import Backend, Feed
from emlocal.cancel import never
from emlocal.errors import (
    BackendError,
    CancelledError,
    ContextFullError,
    EmlocalError,
    UsageError,
)
from emlocal.generation.constraints import Constrainer, ConstraintError
from emlocal.generation.drawing import Wanted, drawn
from emlocal.generation.runner import Completed, Event, Finished, Handle, Job, Runner, Token
from emlocal.generation.sample import FinishReason, Request, Sample
from emlocal.generation.sequences import WORTH_SHARING, Group, Kept, Sequences, Stream, common, tokens_of
from emlocal.generation.speculation import Speculation
from emlocal.generation.thinking import Marks, Thoughts
from emlocal.sampling import Draw

PROMPT_TOKENS_PER_STEP = 256
"""Tokens of prompts that a step reads, beside the samples that are decoded."""
SPARE_SEQUENCES = 2
"""Sequences in addition to the samples': the root, and a prompt whose samples have not all begun."""


class Scheduler(Runner):
    """A runner over a token engine. It decodes at most `parallel` samples at once.

    The engine must hold one sequence more, for a prompt whose samples have not all begun; with
    `SPARE_SEQUENCES` there is one for the root as well. Any further sequences keep earlier prompts.
    """

    def __init__(self, backend: Backend, parallel: int, speculation: Speculation | None = None) -> None:
        """`speculation`: guesses tokens, if the engine can go back from wrong ones."""
        if not 1 <= parallel <= backend.max_sequences - 1:
            raise UsageError(
                f"{parallel} samples at once need {parallel + 1} sequences;"
                f" the backend holds {backend.max_sequences}"
            )
        super().__init__(backend.context)
        self.backend = backend
        self.parallel = parallel
        self._queue: deque[Group] = deque()
        self._reading: list[Group] = []  # some of their samples have not begun
        self._streams: list[Stream] = []
        roomy = backend.max_sequences > parallel + SPARE_SEQUENCES
        self._sequences = Sequences(backend, parallel, roomy, self._reading, self._streams)
        self._full = False  # no job is admitted before another has ended
        self._seconds = 0.0  # of the last pass
        self._events: list[Event] = []  # of this step
        self._previous = tokens_of(())  # the prompt admitted last, without its last token
        self._constrainer = Constrainer(backend)
        self._speculation = speculation if backend.rewinds else None

    # ------------------------------------------------------------------------------------ the contract

    def submit(self, job: Job) -> Handle:
        self.check(job)
        samples = [self._sample(i, request, job) for i, request in enumerate(job.requests, job.first_sample)]
        group = Group(job, samples)
        self._queue.append(group)
        return group

    def check(self, job: Job) -> None:
        """Checks as `Runner.check` does; also raises UsageError for a constraint that cannot be used."""
        super().check(job)
        for request in job.requests:
            if request.constraint is not None:
                self._constrainer.compiled(request.constraint)

    def _sample(self, number: int, request: Request, job: Job) -> Sample:
        """A sample before its first token, after those of its answer that the prompt holds."""
        matcher = None
        if request.constraint is not None:
            matcher = self._constrainer.compiled(request.constraint).copy()
        thoughts = None
        if request.reasoning is not None and self._marks is not None:
            prompt = job.prompt[: len(job.prompt) - len(request.begun)]
            inside = self._marks.inside(prompt, self.backend)
            thoughts = Thoughts(self._marks, request.reasoning, inside=inside)
        for token in request.begun:
            if matcher is not None and (thoughts is None or thoughts.part == "answer"):
                matcher.take(token)
            if thoughts is not None:
                thoughts.push(token, self.backend.token_bytes(token))
        return Sample(number, request, job.prompt, matcher, thoughts)

    @cached_property
    def _marks(self) -> Marks | None:
        """The marks of the model's thoughts."""
        return Marks.of(self.backend)

    def cancel(self, handle: Handle) -> list[Event]:
        if handle.finished:
            return []
        assert isinstance(handle, Group)
        return self._end_group(handle, "cancelled")

    def step(self, cancelled: Callable[[], bool] = never) -> list[Event]:
        self._admit(cancelled)
        lone = self._lone()
        if lone is not None:
            self._read_at_once(lone, cancelled)
        else:
            self._begin()
            self._sequences.close_ranks()
            self._pass(cancelled)
        events, self._events = self._events, []
        return events

    @property
    def free(self) -> int:
        return max(0, self.parallel - self.held)

    @property
    def held(self) -> int:
        """Number of samples that are not finished."""
        return len(self._streams) + sum(len(group.waiting) for group in (*self._reading, *self._queue))

    @property
    def decoded(self) -> int:
        """Number of samples that are being decoded."""
        return len(self._streams)

    @property
    def kept(self) -> int:
        """Number of sequences that are kept for later prompts."""
        return self._sequences.kept

    def make_room(self) -> bool:
        """Drops the kept sequence that was not used for the longest time; returns False if there is none."""
        return self._sequences.make_room()

    @property
    def idle(self) -> bool:
        return not (self._streams or self._reading or self._queue)

    def run(self, source: Callable[[], Job | None], cancelled: Callable[[], bool] = never) -> Iterator[Event]:
        if self._sequences.root is None and self.backend.max_sequences >= self.parallel + SPARE_SEQUENCES:
            # the root comes first, because engines prefer decoded sequences whose numbers follow in order
            self._sequences.start_root(tokens_of(()), None)
        try:
            yield from super().run(source, cancelled)
        finally:
            self._sequences.give_up_root()

    def forget(self) -> None:
        self._sequences.clear()
        self._previous = tokens_of(())

    def close(self) -> None:
        for group in [*self._queue, *self._reading, *(stream.group for stream in self._streams)]:
            self.cancel(group)
        self._sequences.give_up_root()
        self.forget()

    def sequence(self, handle: Handle) -> int:
        """Returns the engine's sequence of a job with one sample, while it is decoded."""
        return next(stream.sequence for stream in self._streams if stream.group is handle)

    # ------------------------------------------------------------------------- from the queue to a place

    def _admit(self, cancelled: Callable[[], bool]) -> None:
        """Admits jobs while places are free; places for waiting samples count as taken."""
        self._full = self._full and bool(self._streams or self._reading)
        new: list[Group] = []
        taken = len(self._streams) + sum(len(group.waiting) for group in self._reading)
        while self._queue and taken < self.parallel and not self._full:
            group = self._queue[0]
            if self._sequences.root is not None:
                self._read_common(group, cancelled)
            elif self._is_being_read(group, new):
                break
            self._queue.popleft()
            group.admitted = time.perf_counter()
            new.append(group)
            taken += len(group.waiting)
        for group in new:
            self._sequences.attach(group)
            self._reading.append(group)

    def _is_being_read(self, group: Group, new: Sequence[Group]) -> bool:
        """Returns whether another job is about to read this one's beginning; this job then waits for it."""
        there, most = self._sequences.longest(group)[0], len(group.tokens) - 1
        coming = (common(other.tokens, group.tokens, most) for other in (*self._reading, *new))
        return max(coming, default=0) >= there + WORTH_SHARING

    def _read_common(self, group: Group, cancelled: Callable[[], bool]) -> None:
        """Reads into the root the common beginning of this prompt and the one before it, if it is long.

        It is read by itself, unless a running job has it. So the root, to the last bit, does not depend on
        the prompt that came first, and a run that was killed continues as it was.
        """
        tokens = group.tokens[:-1]
        shared, held = common(self._previous, tokens), self._sequences.in_root(tokens, len(tokens))
        if shared >= held + WORTH_SHARING:
            most, donor = self._sequences.longest_running(group)
            if most < held + WORTH_SHARING:
                most, donor = held, None
            root = self._sequences.start_root(tokens[: min(most, shared)], donor)
            unread = group.job.prompt[len(root.tokens) : shared]
            try:
                if unread:
                    self._forward([Feed(root.sequence, unread, wanted=False)], cancelled)
            except ContextFullError:
                self._sequences.give_up_root()
                return
            except CancelledError:
                root.tokens = tokens[: self.backend.length(root.sequence)]
                raise
            root.tokens = tokens[:shared]
        self._previous = tokens

    def _begin(self) -> None:
        """Starts samples of prompts that are read: on copies, the last one in the prompt's own sequence."""
        for group in self._reading:
            while not group.unread and group.waiting and len(self._streams) < self.parallel:
                assert group.sequence is not None
                last = len(group.waiting) == 1
                sequence = group.sequence if last else self._sequences.copy(group.sequence)
                stream = Stream(group, group.waiting.popleft(), sequence, group.job.prompt[-1])
                self._streams.append(stream)
                group.sequence = None if last else group.sequence
        self._reading[:] = [group for group in self._reading if group.waiting]

    # ------------------------------------------------------------------------------------------ passes

    def _lone(self) -> Group | None:
        """Returns the job to read at once, if it is the only one and has a place for each sample; or None."""
        if len(self._reading) != 1 or self._streams:
            return None
        group = self._reading[0]
        whole = group.job.at_once and len(group.waiting) == len(group.job.requests) <= self.parallel
        return group if whole else None

    def _read_at_once(self, group: Group, cancelled: Callable[[], bool]) -> None:
        """Reads a prompt with its last token, and begins all samples with that row."""
        assert group.sequence is not None
        while True:
            try:
                self._forward([Feed(group.sequence, group.job.prompt[group.read :])], cancelled)
                break
            except ContextFullError as error:
                if not self._sequences.make_room():
                    self._events += self._end_group(group, "context", error)
                    return
        self._reading.remove(group)
        samples = [*group.waiting]
        group.waiting.clear()
        draws = self._drawn([(sample, group.sequence, 0) for sample in samples])
        own = len(samples) == 1  # otherwise the prompt stays, for later jobs
        for sample in samples:
            sequence = group.sequence if own else self._sequences.copy(group.sequence)
            self._streams.append(Stream(group, sample, sequence, -1))
        if not own:
            self._sequences.keep(Kept(group.sequence, tokens_of(group.tokens), group.job.session))
        group.sequence = None
        group.forward_passes -= len(samples) - 1
        self._take(self._streams, draws)

    def _pass(self, cancelled: Callable[[], bool]) -> None:
        """Takes a step of all samples, and reads the next part of the prompts."""
        speculation = self._speculation
        while self._streams or self._reading:
            parts = self._parts_of_prompts()
            if speculation is not None:
                speculation.guess(self._streams, self.context)
            feeds = [
                Feed(
                    stream.sequence,
                    (stream.next_token, *stream.guess),
                    0 if stream.sample.forced is not None else 1 + len(stream.guess),
                )
                for stream in self._streams
            ]
            feeds += [Feed(sequence, tokens, wanted=False) for _, sequence, tokens in parts]
            try:
                self._forward(feeds, cancelled if parts else never)
            except ContextFullError as error:
                if speculation is not None and any(stream.guess for stream in self._streams):
                    speculation.give_up(self._streams)  # guesses take nobody's room
                    speculation = None
                elif not self._sequences.make_room():
                    self._give_way(error)
                continue
            for group, _, tokens in parts:
                group.read += len(tokens)
                group.forward_passes += 1
            self._verify(alone=not parts)
            return

    def _verify(self, *, alone: bool) -> None:
        """Draws from the rows of a pass: first each sample's, then the next ones' while guesses are right.

        A row is drawn only after the tokens before it are taken in. Its penalties, constraint and thoughts
        are therefore those of a pass without guesses. `alone`: the pass read no prompts.
        """
        streams, taken = [*self._streams], 0
        tokens: dict[Stream, list[int]] = {stream: [] for stream in streams}
        rows = sum(1 + len(stream.guess) for stream in streams)
        while streams:
            draws = self._drawn([(each.sample, each.sequence, len(each.guess) - taken) for each in streams])
            guesses = [stream.guess for stream in streams]  # taking in the end of a sample forgets its own
            self._take(streams, draws, first=taken == 0)
            further = []
            for stream, guess, draw in zip(streams, guesses, draws, strict=True):
                if isinstance(draw, Draw):
                    tokens[stream].append(draw.token)
                    goes_on = not (stream.sample.done or stream.group.finished)
                    if goes_on and taken < len(guess) and draw.token == guess[taken]:
                        further.append(stream)
            streams, taken = further, taken + 1
        if self._speculation is not None:
            self._speculation.learn(tokens, rows, self._seconds if alone else None)
        for stream in self._streams:
            self._rewind(stream)

    def _rewind(self, stream: Stream) -> None:
        """Cuts off what was guessed wrongly."""
        if stream.guess:
            stream.guess = ()
            if self.backend.trim(stream.sequence, stream.held) != stream.held:
                raise BackendError(f"the {self.backend.name} engine cannot go back from a guessed token")

    def _drawn(self, wanted: Sequence[Wanted]) -> list[Draw | EmlocalError]:
        return drawn(self.backend, wanted, self.counters)

    def _parts_of_prompts(self) -> list[tuple[Group, int, Sequence[int]]]:
        room, parts = PROMPT_TOKENS_PER_STEP, []
        for group in self._reading:
            part = group.job.prompt[group.read : group.read + min(room, group.unread)]
            if part and group.sequence is not None:
                parts.append((group, group.sequence, part))
                room -= len(part)
        return parts

    def _forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool]) -> None:
        started = time.perf_counter()
        try:
            self.backend.forward(feeds, cancelled)
        except (ContextFullError, CancelledError):
            self._look_again()
            raise
        seconds = time.perf_counter() - started
        self._seconds = seconds
        read = sum(len(feed.tokens) for feed in feeds if feed.wanted < len(feed.tokens))
        self.counters.steps += 1
        self.counters.forward_seconds += seconds
        self.counters.reading_seconds += seconds if read else 0
        self.counters.prompt_tokens += read

    def _look_again(self) -> None:
        """Adjusts jobs after a failed pass, in which an engine may have emptied sequences."""
        for group in self._reading:
            if group.sequence is not None:
                group.read = min(group.read, self.backend.length(group.sequence))
        for stream in [*self._streams]:
            if not stream.group.finished and self.backend.length(stream.sequence) != stream.held:
                lost = BackendError("the engine lost its cached tokens in an interrupted forward pass")
                self._events += self._end_group(stream.group, "stop", lost)

    def _give_way(self, error: ContextFullError) -> None:
        """Makes room if a pass has none, which happens only if sequences share it.

        The job that came last waits. A lone prompt fails. If all are being decoded, the longest one ends.
        """
        self._full = True
        if self._reading and (self._streams or len(self._reading) > 1):
            group = self._reading.pop()
            assert group.sequence is not None
            self.backend.release(group.sequence)
            group.sequence, group.read = None, 0
            self._queue.appendleft(group)
        elif self._reading:
            self._events += self._end_group(self._reading[0], "context", error)
        else:
            longest = max(self._streams, key=lambda stream: stream.group.timings.generated_tokens).group
            for stream in [stream for stream in self._streams if stream.group is longest]:
                stream.sample.end("context")
                self._end_stream(stream)

    # ------------------------------------------------------------------------- the results of a pass

    def _take(
        self, streams: Sequence[Stream], draws: Sequence[Draw | EmlocalError], *, first: bool = True
    ) -> None:
        """Takes in a draw for each stream. `first`: of this pass."""
        now = time.perf_counter()
        for stream, draw in zip([*streams], draws, strict=True):
            group, sample = stream.group, stream.sample
            if group.finished:  # another of its samples failed
                continue
            group.forward_passes += first
            if isinstance(draw, EmlocalError):
                self._events += self._end_group(group, "stop", draw)
                continue
            timings = group.timings
            if not timings.generated_tokens:
                group.first_draw, timings.prompt_seconds = now, now - group.admitted
            timings.generated_tokens += 1
            timings.generation_seconds = time.perf_counter() - group.first_draw
            try:
                text, reasoning = sample.accept(draw, self.backend)
            except ConstraintError as error:
                self._events += self._end_group(group, "stop", error)
                continue
            noted = sample.completion.alternatives
            tops = noted[-1] if noted else ()
            self._events.append(Token(group, sample.completion.sample, draw, text, reasoning, tops))
            stream.next_token = draw.token
            if not sample.done and stream.held >= self.context:
                sample.end("context")
            if sample.done:
                self._end_stream(stream)

    def _end_stream(self, stream: Stream) -> None:
        """Frees the place of a sample that ended; its job ends with the last one."""
        group, completion = stream.group, stream.sample.completion
        self._leave(stream)
        group.completions.append(completion)
        self._events.append(Completed(group, completion))
        if len(group.completions) == len(group.job.requests):
            self._events.append(self._finish(group))

    def _leave(self, stream: Stream) -> None:
        """Keeps a stream's sequence."""
        self._rewind(stream)
        self._streams.remove(stream)
        tokens = stream.group.tokens + tokens_of(stream.sample.completion.tokens)
        self._sequences.keep(Kept(stream.sequence, tokens, stream.group.job.session))
        self._sequences.left(stream.sequence)
        self._full = False

    def _end_group(
        self, group: Group, reason: FinishReason, error: EmlocalError | None = None
    ) -> list[Event]:
        """Ends a job, wherever it is. With an error, it has no completions."""
        samples = [*group.waiting]
        group.waiting.clear()
        for stream in [stream for stream in self._streams if stream.group is group]:
            self._leave(stream)
            samples.append(stream.sample)
        if group in self._queue:
            self._queue.remove(group)
        if group in self._reading:
            self._reading.remove(group)
        if group.sequence is not None:
            self._sequences.keep(Kept(group.sequence, group.tokens[: group.read], group.job.session))
            group.sequence, self._full = None, False
        for sample in samples:
            sample.end(reason)
        completions = [sample.completion for sample in samples]
        group.completions = [] if error else [*group.completions, *completions]
        group.error = error
        events: list[Event] = [] if error else [Completed(group, completion) for completion in completions]
        return [*events, self._finish(group)]

    def _finish(self, group: Group) -> Finished:
        group.completions.sort(key=lambda completion: completion.sample)
        group.seconds = time.perf_counter() - group.admitted if group.admitted else 0.0
        group.finished = True
        return Finished(group)
