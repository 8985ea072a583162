"""The contract of a runner: jobs in at any time, events out token by token.

It stands between the rooms that ask (methods, chat, batch, evaluation, training, a server) and the engine
that answers. `Scheduler` is the runner over an engine of tokens; an engine that takes whole requests can be a
runner by itself.

A runner belongs to one thread. Call `submit` and `cancel` between two steps; they take effect in the next
one. A server gives the runner a thread of its own, which takes other threads' requests from a queue, calls
`step`, and passes the events on (`loop.call_soon_threadsafe`). Then nothing here needs a lock.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import astuple, dataclass
from types import TracebackType
from typing import NamedTuple, Self

from emlocal.cancel import never
from emlocal.errors import CancelledError, ContextFullError, EmlocalError, UsageError
from emlocal.generation.alternatives import Alternative
from emlocal.generation.sample import Completion, Request
from emlocal.sampling import Draw


@dataclass(frozen=True, eq=False)
class Job:
    """A prompt, and the samples to draw from it."""

    prompt: Sequence[int]
    requests: Sequence[Request]
    at_once: bool = False
    """Whether to read the whole prompt in one pass, if nothing else runs, and begin all samples there.

    The first token then comes as soon as it can, and jobs submitted meanwhile wait for that pass.
    """
    session: Hashable | None = None
    """The session of the job; jobs of one session follow each other.

    The sequence that an earlier job left is cut to the beginning of the next one. Without a session it stays
    beside the new one, as long as there is room.
    """
    first_sample: int = 0
    """The number of the first of `requests`, if a method asks for samples in several jobs."""
    adapter: str = ""
    """The adapter to compute with, by name (`AdapterRunner`); "": the model as it was loaded."""


@dataclass
class Timings:
    """The tokens and seconds of a job."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """The prompt's tokens that a sequence held already."""
    prompt_seconds: float = 0.0
    """Seconds from the job's first pass, or from its wait for a shared beginning, to its first draw."""
    generated_tokens: int = 0
    """Tokens of all samples."""
    generation_seconds: float = 0.0
    """Seconds from the first draw to the last so far."""

    def __add__(self, other: "Timings") -> "Timings":
        return Timings(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Handle:
    """A submitted job and its progress. Only the runner writes it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.timings = Timings(prompt_tokens=len(job.prompt))
        self.forward_passes = 0
        """Forward passes that it took part in, summed over its samples."""
        self.seconds = 0.0
        """Seconds from its admission to its end; other jobs ran beside it."""
        self.completions: list[Completion] = []
        """The samples that ended, in the order of their numbers once the job is finished."""
        self.error: EmlocalError | None = None
        """The reason why there are no completions."""
        self.finished = False

    @property
    def was_cancelled(self) -> bool:
        """Whether a sample was stopped before its end."""
        return any(completion.finish_reason == "cancelled" for completion in self.completions)

    def result(self) -> list[Completion]:
        """Returns the completions of a finished job. Raises its error."""
        if self.error is not None:
            raise self.error
        return self.completions


class Token(NamedTuple):
    """One token of one sample, and the text that it made certain (maybe none, maybe more than its own)."""

    handle: Handle
    sample: int
    draw: Draw
    text: str
    reasoning: str = ""
    """Text of the thought before the answer."""
    alternatives: Sequence[Alternative] = ()
    """Where the request asks for them."""


class Completed(NamedTuple):
    """The end of a sample."""

    handle: Handle
    completion: Completion


class Finished(NamedTuple):
    """The end of a job, with all its completions or with an error."""

    handle: Handle


Event = Token | Completed | Finished
"""The events of a job: its tokens, a `Completed` for each sample, and at last, once, `Finished`."""


@dataclass
class Counters:
    """Tokens and seconds of all jobs so far."""

    steps: int = 0
    prompt_tokens: int = 0
    """Computed tokens, without shared ones."""
    generated_tokens: int = 0
    forward_seconds: float = 0.0
    reading_seconds: float = 0.0
    """Part of `forward_seconds` in steps that read prompts."""
    sampling_seconds: float = 0.0


class Runner(ABC):
    """A runner of jobs. A context manager, which closes it."""

    def __init__(self, context: int) -> None:
        """Sets the limit. `context`: the most tokens of a prompt and its answer together."""
        self.context = context
        self.counters = Counters()
        self._inboxes: dict[Handle, deque[Event]] = {}

    @abstractmethod
    def submit(self, job: Job) -> Handle:
        """Takes a job. It begins when there is a place, in the order of submission.

        Raises UsageError and ContextFullError as `check` does; an impossible job never gets in.
        """

    @abstractmethod
    def cancel(self, handle: Handle) -> list[Event]:
        """Ends a job, without any effect on the others, and returns its last events.

        They are its samples with their text so far ("cancelled"), and `Finished`. A finished job has none.
        """

    @abstractmethod
    def step(self, cancelled: Callable[[], bool] = never) -> list[Event]:
        """Runs one forward pass over everything that is being read and decoded; returns its events.

        Raises CancelledError when `cancelled()` becomes true while prompts are read. All jobs are then as
        before, and the next step tries again. The same is true after other errors of the engine.
        """

    @property
    @abstractmethod
    def free(self) -> int:
        """How many more samples could be decoded beside the submitted ones."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether nothing is left to do."""

    @abstractmethod
    def forget(self) -> None:
        """Drops the tokens that are kept for later prompts."""

    @abstractmethod
    def close(self) -> None:
        """Cancels all jobs and drops everything kept; the engine then holds nothing of this runner."""

    def check(self, job: Job) -> None:
        """Raises an error for a job that cannot be done.

        UsageError for an empty prompt or no samples, ContextFullError for a prompt that leaves no room for a
        token.
        """
        check_prompt(job.prompt, self.context)
        if not job.requests:
            raise UsageError("the number of samples must be at least 1")

    def follow(self, jobs: Sequence[Job], cancelled: Callable[[], bool] = never) -> Iterator[Event]:
        """Yields the events of these jobs until all are finished; other jobs continue meanwhile.

        When `cancelled()` becomes true, their samples end with their text so far. Leaving the iterator
        cancels them, too.

        Raises:
            UsageError, ContextFullError: see `check`.
            CancelledError: it was cancelled before the first token.
        """
        for job in jobs:
            self.check(job)
        handles = [self.submit(job) for job in jobs]
        inbox: deque[Event] = deque()
        self._inboxes.update(dict.fromkeys(handles, inbox))
        try:
            while True:
                while inbox:
                    yield inbox.popleft()
                if all(handle.finished for handle in handles):
                    return
                if cancelled():
                    if not any(handle.timings.generated_tokens for handle in handles):
                        raise CancelledError
                    yield from [event for handle in handles for event in self.cancel(handle)]
                    return
                self._deliver(cancelled)
        finally:
            for handle in handles:
                del self._inboxes[handle]
                self.cancel(handle)

    def run(self, source: Callable[[], Job | None], cancelled: Callable[[], bool] = never) -> Iterator[Event]:
        """Yields the events of the jobs that `source` returns; it is called whenever there is a free place.

        None means that it has no job at the moment; the run ends when it has none and all are finished.
        Leaving the iterator cancels the jobs. Raises CancelledError, and the errors of `submit`.
        """
        mine: set[Handle] = set()
        inbox: deque[Event] = deque()
        try:
            while True:
                while self.free > 0 and (job := source()) is not None:
                    handle = self.submit(job)
                    self._inboxes[handle] = inbox
                    mine.add(handle)
                if not mine:
                    return
                if cancelled():
                    raise CancelledError
                self._deliver(cancelled)
                while inbox:
                    yield inbox.popleft()
                for handle in [handle for handle in mine if handle.finished]:
                    mine.remove(handle)
                    del self._inboxes[handle]
        finally:
            for handle in mine:
                del self._inboxes[handle]
                self.cancel(handle)

    def _deliver(self, cancelled: Callable[[], bool]) -> None:
        """Takes a step, and gives its events to those that wait for them."""
        for event in self.step(cancelled):
            self._inboxes[event.handle].append(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_prompt(prompt: Sequence[int], context: int) -> None:
    """Raises UsageError for an empty prompt, ContextFullError for one that leaves no room for a token."""
    if not prompt:
        raise UsageError("the prompt is empty", "give a text as an argument, with -f FILE or on stdin")
    if len(prompt) >= context:
        raise ContextFullError(
            f"the prompt has {len(prompt):,} tokens;"
            f" the context holds {context:,}, one of them for the answer",
            "shorten the prompt or set a larger --context",
        )
