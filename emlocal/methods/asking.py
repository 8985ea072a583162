"""Questions on a runner, each through its method: one of a chat, or as many at once as there are places."""

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

from emlocal.cancel import never
from emlocal.errors import CancelledError, EmlocalError
from emlocal.generation import Completed, Finished, Handle, Job, Request, Runner, Token
from emlocal.generation.prompt import Asked
from emlocal.methods import Outcome
from emlocal.methods.method import Method
from emlocal.models.templates import Message
from emlocal.sampling import Uniforms
from emlocal.settings import Plan, SamplingParams

DRAWS_OF_A_ROUND = 1 << 20
"""Sample indices apart: a later round's draws are its own."""


@dataclass(frozen=True)
class Question:
    """What is asked, and how its answers are drawn."""

    asked: Asked
    plan: Plan
    encode: Callable[[Asked], list[int]]
    """The prompt's tokens. Raises EmlocalError."""
    key: int = 0
    """Of the draws, which are addressed by seed, key, sample and token."""
    attempt: int = 0
    """How often it was asked before: other draws each time."""
    at_once: bool = False
    session: Hashable | None = None
    """See `Job`."""

    @cached_property
    def prompt(self) -> Sequence[int]:
        """Its tokens. Raises EmlocalError where it cannot be made."""
        return self.encode(self.asked)

    @property
    def greedy(self) -> SamplingParams:
        """The plan's settings for the most probable token each time, without EM."""
        return replace(self.plan.params, temperature=0.0, dynatemp_range=0.0, em=None)

    def uniforms(self, round: int, sample: int, start: int = 0) -> Uniforms:
        """The random numbers of one sample of a round, from its token `start` on."""
        first = round * DRAWS_OF_A_ROUND + self.attempt * self.plan.samples
        return Uniforms(self.plan.seed, self.key, first + sample, start)

    def job(
        self,
        round: int = 0,
        *,
        samples: range | None = None,
        params: SamplingParams | None = None,
        first: SamplingParams | None = None,
        after: Sequence[int] = (),
        max_tokens: int | None = None,
        pause: Callable[[str, int], bool] | None = None,
    ) -> Job:
        """Samples of one round.

        Args:
            round: of the draws: a later round's are its own.
            samples: which of the round's, by number; all that the plan has.
            params: how they are drawn, where not as the plan says.
            first: how the first of these samples is drawn, where not as the others.
            after: tokens of an answer that was begun, which they go on from; so do the draws.
            max_tokens: of each sample beyond these; as many as the plan leaves.
            pause: see `Request`.
        Raises EmlocalError where the prompt cannot be made.
        """
        plan = self.plan
        samples = range(plan.samples) if samples is None else samples
        most = plan.max_tokens - len(after)
        requests = [
            Request(
                (first if i == samples.start else None) or params or plan.params,
                self.uniforms(round, i, len(after)),
                most if max_tokens is None else min(max_tokens, most),
                plan.stop,
                pause,
            )
            for i in samples
        ]
        return Job(
            [*self.prompt, *after],
            requests,
            self.at_once,
            first_sample=samples.start,
            session=self.session,
        )

    def then(self, answer: str, said: str) -> "Question":
        """The question that follows on this one, its answer, and what is said to that."""
        if isinstance(self.asked, str):
            return replace(self, asked=f"{self.asked}{answer}\n\n{said}\n\n")
        more: list[Message] = [{"role": "assistant", "content": answer}, {"role": "user", "content": said}]
        return replace(self, asked=[*self.asked, *more])


class Asking:
    """A question on its way through a method."""

    def __init__(self, method: Method, question: Question) -> None:
        self.question = question
        self.outcome: Outcome | None = None
        self.error: EmlocalError | None = None
        """Why there is no outcome."""
        self._answering = method.answer(question)
        self._round: Sequence[Job] = ()
        self._handles: dict[Job, Handle] = {}  # of the round, those that are finished

    @property
    def done(self) -> bool:
        """Whether there is an outcome or an error."""
        return self.outcome is not None or self.error is not None

    def result(self) -> Outcome:
        """The outcome. Raises the error."""
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        return self.outcome

    def start(self, check: Callable[[Job], None]) -> Sequence[Job]:
        """The jobs of the first round; none where it is done already. `check` raises for a bad job."""
        return self._next(lambda: next(self._answering), check)

    def go_on(self, handle: Handle, check: Callable[[Job], None]) -> Sequence[Job]:
        """A job is finished. The jobs of the next round, where it was the last of its own."""
        self._handles[handle.job] = handle
        if len(self._handles) < len(self._round):
            return ()
        done = [self._handles.pop(job) for job in self._round]
        error = next((handle.error for handle in done if handle.error is not None), None)
        return self._next(
            lambda: self._answering.throw(error) if error else self._answering.send(done), check
        )

    def stop(self, why: CancelledError, check: Callable[[Job], None]) -> Sequence[Job]:
        """The round was cancelled before it had said anything. Raises CancelledError where the method has
        no answer yet."""
        return self._next(lambda: self._answering.throw(why), check)

    def _next(self, step: Callable[[], Sequence[Job]], check: Callable[[Job], None]) -> Sequence[Job]:
        try:
            while True:
                self._round = step()
                refused = _refusal(self._round, check)
                if refused is None:
                    return self._round
                step = partial(self._answering.throw, refused)
        except StopIteration as stop:
            self.outcome = stop.value
        except EmlocalError as error:
            self.error = error
        return ()


def _refusal(jobs: Sequence[Job], check: Callable[[Job], None]) -> EmlocalError | None:
    """Why the runner will not take one of the jobs."""
    try:
        for job in jobs:
            check(job)
    except EmlocalError as why:
        return why
    return None


class Answered(NamedTuple):
    """A question is answered, or failed."""

    asking: Asking


def ask(
    runner: Runner, source: Callable[[], Asking | None], cancelled: Callable[[], bool] = never
) -> Iterator[Token | Completed | Answered]:
    """Answer the questions that `source` gives, which is asked whenever there is a free place.

    None means that it has none at the moment; the run ends when it has none and all are answered. What
    fails is answered with its error, and the others go on.

    Raises CancelledError, and what the engine raises.
    """
    asking_of: dict[Job, Asking] = {}
    waiting: deque[Job] = deque()  # of later rounds, which go first
    done: deque[Asking] = deque()

    def take(asking: Asking, jobs: Sequence[Job]) -> None:
        asking_of.update(dict.fromkeys(jobs, asking))
        waiting.extend(jobs)
        if asking.done:
            done.append(asking)

    def next_job() -> Job | None:
        while not waiting:
            asking = source()
            if asking is None:
                return None
            take(asking, asking.start(runner.check))
        return waiting.popleft()

    while True:
        for event in runner.run(next_job, cancelled):
            if isinstance(event, Finished):
                asking = asking_of.pop(event.handle.job)
                take(asking, asking.go_on(event.handle, runner.check))
            else:
                yield event
            while done:
                yield Answered(done.popleft())
        if not done:
            return
        while done:  # failed before they began; with their place the source may go on
            yield Answered(done.popleft())


def ask_one(
    runner: Runner, method: Method, question: Question, cancelled: Callable[[], bool] = never
) -> Iterator[Token | Completed | Answered]:
    """Answer one question. When `cancelled()` becomes true it ends with what was said so far.

    Raises:
        CancelledError: it was cancelled before there was an answer.
        EmlocalError: what it failed with.
    """
    asking = Asking(method, question)
    jobs = asking.start(runner.check)
    while not asking.done:
        handles: dict[Handle, None] = {}
        try:
            for event in runner.follow(jobs, cancelled):
                if isinstance(event, Finished):
                    handles[event.handle] = None
                else:
                    yield event
        except CancelledError as why:
            jobs = asking.stop(why, runner.check)
            continue
        for handle in handles:
            jobs = asking.go_on(handle, runner.check)
    asking.result()
    yield Answered(asking)
