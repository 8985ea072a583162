"""Questions on a runner, each answered by its method: one at a time, or as many as there are places."""

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

from emlocal.cancel import never
from emlocal.errors import CancelledError, EmlocalError
from emlocal.generation import Completed, Finished, Handle, Job, Request, Runner, Token
from emlocal.generation.dialogue import dialogue_of
from emlocal.generation.prompt import Asked, with_more
from emlocal.generation.thinking import Reasoning
from emlocal.methods import Outcome
from emlocal.methods.method import Method
from emlocal.sampling import Uniforms
from emlocal.settings import Plan, SamplingParams

DRAWS_OF_A_ROUND = 1 << 20
"""Distance between the sample indices of two rounds, so that each round has its own draws."""


@dataclass(frozen=True)
class Question:
    """A question, and how its answers are drawn."""

    asked: Asked
    plan: Plan
    encode: Callable[[Asked], list[int]]
    """Returns the prompt's tokens. Raises EmlocalError."""
    key: int = 0
    """Key of the draws, which depend on seed, key, sample and token."""
    attempt: int = 0
    """How often the question was asked before; each attempt has other draws."""
    at_once: bool = False
    session: Hashable | None = None
    """`at_once` and `session`: see `Job`."""
    top: int = 0
    """Number of alternatives to note for each token."""
    adapter: str = ""
    """See `Job`."""

    @cached_property
    def prompt(self) -> Sequence[int]:
        """The prompt's tokens. Raises EmlocalError if it cannot be made."""
        asked, variables = self.asked, self.plan.template_variables
        if variables and not isinstance(asked, str):
            own = dialogue_of(asked)
            asked = replace(own, variables={**own.variables, **variables})
        return self.encode(asked)

    @property
    def greedy(self) -> SamplingParams:
        """The plan's settings, but with the most probable token each time and without EM."""
        return replace(self.plan.params, temperature=0.0, dynatemp_range=0.0, em=None)

    def uniforms(self, round: int, sample: int, start: int = 0) -> Uniforms:
        """Returns the random numbers of one sample of a round, from token `start` on."""
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
        free: bool = False,
    ) -> Job:
        """Makes the job for samples of one round.

        Args:
            round: the number of the round; each round has its own draws.
            samples: numbers of the samples in the round; default: all that the plan has.
            params: sampling settings; default: the plan's.
            first: sampling settings of the first of these samples, if they differ.
            after: tokens of a begun answer, which the samples and their draws continue.
            max_tokens: limit of each sample beyond these tokens; default: as many as the plan leaves.
            pause: see `Request`.
            free: the plan's constraint does not apply: this is not an answer to the question.

        Raises EmlocalError if the prompt cannot be made.
        """
        plan = self.plan
        samples = range(plan.samples) if samples is None else samples
        most = plan.max_tokens - len(after)
        constraint = None if free else plan.constraint
        requests = []
        for i in samples:
            given = (first if i == samples.start else None) or params or plan.params
            of_answer, of_thought = plan.by_part(given)
            reasoning = None if isinstance(self.asked, str) else Reasoning(plan.think_budget, of_thought)
            requests.append(
                Request(
                    given if reasoning is None else of_answer,
                    self.uniforms(round, i, len(after)),
                    most if max_tokens is None else min(max_tokens, most),
                    plan.stop,
                    pause,
                    constraint,
                    tuple(after),
                    reasoning,
                    self.top,
                )
            )
        return Job(
            [*self.prompt, *after],
            requests,
            self.at_once,
            first_sample=samples.start,
            session=self.session,
            adapter=self.adapter,
        )

    def then(self, answer: str, said: str) -> "Question":
        """Returns the question that follows this one, its answer, and the reply to the answer."""
        if isinstance(self.asked, str):
            return replace(self, asked=f"{self.asked}{answer}\n\n{said}\n\n")
        return replace(self, asked=with_more(self.asked, answer, said))


class Asking:
    """A question in progress, answered by a method."""

    def __init__(self, method: Method, question: Question) -> None:
        self.question = question
        self.outcome: Outcome | None = None
        self.error: EmlocalError | None = None
        """The error, if there is no outcome."""
        self._answering = method.answer(question)
        self._round: Sequence[Job] = ()
        self._handles: dict[Job, Handle] = {}  # finished jobs of the round

    @property
    def done(self) -> bool:
        """Whether there is an outcome or an error."""
        return self.outcome is not None or self.error is not None

    def result(self) -> Outcome:
        """Returns the outcome, or raises the error."""
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        return self.outcome

    def start(self, check: Callable[[Job], None]) -> Sequence[Job]:
        """Returns the jobs of the first round; none if it is done already. `check` raises for a bad job."""
        return self._next(lambda: next(self._answering), check)

    def go_on(self, handle: Handle, check: Callable[[Job], None]) -> Sequence[Job]:
        """Takes a finished job. Returns the jobs of the next round if it was the last of its round."""
        self._handles[handle.job] = handle
        if len(self._handles) < len(self._round):
            return ()
        done = [self._handles.pop(job) for job in self._round]
        error = next((handle.error for handle in done if handle.error is not None), None)
        return self._next(
            lambda: self._answering.throw(error) if error else self._answering.send(done), check
        )

    def stop(self, why: CancelledError, check: Callable[[Job], None]) -> Sequence[Job]:
        """Cancels the round before any answer of it began.

        Raises CancelledError if the method has no answer yet.
        """
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
    """Returns the error with which the runner refuses one of the jobs, or None."""
    try:
        for job in jobs:
            check(job)
    except EmlocalError as why:
        return why
    return None


class Answered(NamedTuple):
    """A question that was answered or that failed."""

    asking: Asking


def ask(
    runner: Runner, source: Callable[[], Asking | None], cancelled: Callable[[], bool] = never
) -> Iterator[Token | Completed | Answered]:
    """Answers the questions from `source`, which is called whenever there is a free place.

    `source` returns None if it has no question at the moment. The run ends when it has none and all are
    answered. A question that fails is returned with its error, and the others continue.

    Raises CancelledError, and the engine's errors.
    """
    asking_of: dict[Job, Asking] = {}
    waiting: deque[Job] = deque()  # jobs of later rounds, which go first
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
        while done:  # these failed before they began; their places are free for the source
            yield Answered(done.popleft())


def ask_one(
    runner: Runner, method: Method, question: Question, cancelled: Callable[[], bool] = never
) -> Generator[Token | Completed | Answered, None, None]:
    """Answers one question. When `cancelled()` becomes true, it ends with the text so far.

    Raises:
        CancelledError: it was cancelled before there was an answer.
        EmlocalError: the error of the question.
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
