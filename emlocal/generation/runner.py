"""What answers: jobs in at any time, events out token by token.

This is the contract between those that ask (methods, chat, batch, evaluation, training, a server) and what
answers them. `Scheduler` is the runner over an engine of tokens; an engine that takes whole requests can be
a runner by itself.

A runner belongs to one thread. `submit` and `cancel` are for between two steps, and take effect in the next
one. A server gives the runner a thread of its own, which takes what others want from a queue, calls `step`,
and hands the events on (`loop.call_soon_threadsafe`); nothing here needs a lock then.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import astuple, dataclass
from types import TracebackType
from typing import NamedTuple, Self

from emlocal.cancel import never
from emlocal.errors import CancelledError, ContextFullError, EmlocalError, UsageError
from emlocal.generation.sample import Completion, Request
from emlocal.sampling import Draw


@dataclass(frozen=True, eq=False)
class Job:
    """A prompt, and the samples to be drawn from it."""

    prompt: Sequence[int]
    requests: Sequence[Request]
    at_once: bool = False
    """Read the whole prompt in one pass where nothing else runs, and begin all samples with its last row:
    the first token comes as soon as it can, and what is submitted meanwhile waits for that pass."""
    session: Hashable | None = None
    """Jobs of one session follow each other: what an earlier one left is cut to what the next one begins
    with. Without a session it stays beside the new one, as long as there is room."""
    first_sample: int = 0
    """The number of the first of `requests`, where a method asks for samples in several jobs."""


@dataclass
class Timings:
    """What a job took. Seconds and tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's tokens, those that were held already."""
    prompt_seconds: float = 0.0
    """From the job's first pass, or what it waited for to share, to its first draw."""
    generated_tokens: int = 0
    """Of all samples."""
    generation_seconds: float = 0.0
    """From the first draw to the last so far."""

    def __add__(self, other: "Timings") -> "Timings":
        return Timings(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class Handle:
    """A job that was submitted, and how far it is. For reading; the runner writes it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.timings = Timings(prompt_tokens=len(job.prompt))
        self.forward_passes = 0
        """In how many it took part, summed over its samples."""
        self.seconds = 0.0
        """From its admission to its end; others ran beside it."""
        self.completions: list[Completion] = []
        """The samples that ended, in the order of their numbers once the job is finished."""
        self.error: EmlocalError | None = None
        """Why there are no completions."""
        self.finished = False

    @property
    def was_cancelled(self) -> bool:
        """Whether a sample was stopped before its end."""
        return any(completion.finish_reason == "cancelled" for completion in self.completions)

    def result(self) -> list[Completion]:
        """The completions of a finished job. Raises its error."""
        if self.error is not None:
            raise self.error
        return self.completions


class Token(NamedTuple):
    """One token of one sample, and the text that it made certain (maybe none, maybe more than its own)."""

    handle: Handle
    sample: int
    draw: Draw
    text: str


class Completed(NamedTuple):
    """A sample ended."""

    handle: Handle
    completion: Completion


class Finished(NamedTuple):
    """A job ended: with all its completions, or with an error."""

    handle: Handle


Event = Token | Completed | Finished
"""The events of a job: its tokens, a `Completed` for each sample, and at last, once, `Finished`."""


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


class Runner(ABC):
    """See the module. A context manager, which closes it."""

    def __init__(self, context: int) -> None:
        """`context`: the most tokens of a prompt and its answer together."""
        self.context = context
        self.counters = Counters()
        self._inboxes: dict[Handle, deque[Event]] = {}

    @abstractmethod
    def submit(self, job: Job) -> Handle:
        """Take a job. It begins when there is a place, in the order of submission.

        Raises UsageError and ContextFullError as `check` does; a job that cannot be done never gets in.
        """

    @abstractmethod
    def cancel(self, handle: Handle) -> list[Event]:
        """End a job; the others go on as if nothing had happened. Returns its last events: its samples
        with what they said so far ("cancelled"), and `Finished`. Nothing for one that is finished."""

    @abstractmethod
    def step(self, cancelled: Callable[[], bool] = never) -> list[Event]:
        """One forward pass over what is being read and decoded; its events.

        Raises CancelledError when `cancelled()` becomes true while prompts are read; all jobs are as they
        were before, and the next step tries again. What else the engine raises leaves them so, too.
        """

    @property
    @abstractmethod
    def free(self) -> int:
        """How many more samples could be decoded beside those that were submitted."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """Whether nothing is left to do."""

    @abstractmethod
    def forget(self) -> None:
        """Drop the tokens that are kept for prompts to come."""

    @abstractmethod
    def close(self) -> None:
        """Cancel all jobs and drop what is kept; the engine holds nothing of this runner's afterwards."""

    def check(self, job: Job) -> None:
        """Raise UsageError for an empty prompt or no samples, ContextFullError for a prompt that leaves no
        room for a token."""
        check_prompt(job.prompt, self.context)
        if not job.requests:
            raise UsageError("no samples are asked for")

    def follow(self, jobs: Sequence[Job], cancelled: Callable[[], bool] = never) -> Iterator[Event]:
        """The events of these jobs until all are finished; what else is followed or run goes on meanwhile.

        When `cancelled()` becomes true their samples end with what they said so far. Who walks away cancels.

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
        """The events of the jobs that `source` gives, which is asked whenever there is a free place.

        None means that it has none at the moment; the run ends when it has none and all are finished.
        Who walks away cancels.

        Raises CancelledError, and what `submit` raises.
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
        """A step, whose events go to those that wait for them."""
        for event in self.step(cancelled):
            self._inboxes[event.handle].append(event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_prompt(prompt: Sequence[int], context: int) -> None:
    """Raise UsageError for an empty prompt, ContextFullError for one that leaves no room for a token."""
    if not prompt:
        raise UsageError("the prompt is empty", "give some text as an argument, with -f FILE or on stdin")
    if len(prompt) >= context:
        raise ContextFullError(
            f"the prompt has {len(prompt):,} tokens;"
            f" the context holds {context:,}, one of them for the answer",
            "shorten the prompt or give a larger --context",
        )
