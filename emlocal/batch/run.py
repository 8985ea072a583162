"""Batch runs: a method answers each line, and the answer becomes a row.

Everything streams. A line is read when the runner has room for it, and forgotten once its row is written.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from emlocal.backends.base import Backend
from emlocal.batch.keys import Keys, Places
from emlocal.batch.lines import AnsweredLine, BadLine, Item, Row, openai_row, own_row
from emlocal.batch.tasks import Task, Tasks, said_in
from emlocal.cancel import never
from emlocal.errors import ContextFullError, EmlocalError, UsageError
from emlocal.generation import Runner
from emlocal.generation.dialogue import Dialogue
from emlocal.generation.prompt import Asked, for_template, once, prompt_tokens
from emlocal.methods import Chosen, Outcome
from emlocal.methods.asking import Answered, Asking, Question, ask
from emlocal.methods.confidence import Calibration, confidence_of, subject_of
from emlocal.sampling.draw import request_key
from emlocal.settings import Plan
from emlocal.settings.resolve import names_in, overridden


@dataclass(frozen=True)
class BatchSettings:
    """Settings of all lines, unless a line has its own."""

    plan: Plan
    method: Chosen = field(default_factory=Chosen)
    chosen: frozenset[str] = frozenset()
    """Sampling settings that the user chose explicitly; the method does not change them."""
    system: str | None = None
    """System message for lines that have none."""
    raw: bool = False
    keep: bool = False
    openai: bool = False
    ordered: bool = False
    entropies: bool = False
    """Whether rows list the entropy of each token of the answer, in nats."""
    calibration: Calibration | None = None
    abstain_below: float | None = None
    """Answers with less confidence than this are withheld."""
    fingerprint: str = ""
    """Identifies everything else that makes two runs differ: model, adapters."""


class Batch(Tasks):
    """One run over the lines. `rows` may be called once."""

    def __init__(
        self,
        backend: Backend,
        lines: Iterable[Item | BadLine],
        settings: BatchSettings,
        *,
        runner: Runner,
        done: Keys | None = None,
        places: Places | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Prepares a run.

        `done` holds the keys of existing rows; their lines are skipped. `places` receives the keys of all
        lines in order. `warn` receives messages for people.
        """
        super().__init__(
            lines,
            fingerprint=settings.fingerprint,
            openai=settings.openai,
            ordered=settings.ordered,
            done=done,
            places=places,
        )
        self.runner = runner
        self._backend = backend
        self._settings = settings
        self._cancelled: Callable[[], bool] = never
        self._warn = once(warn)
        self._tasks: dict[Asking, Task] = {}

    @property
    def abstain_below(self) -> float | None:
        """Answers with less confidence than this are withheld."""
        return self._settings.abstain_below

    def rows(self, cancelled: Callable[[], bool] = never) -> Generator[Row, None, None]:
        """Yields rows as they are finished or, with `ordered`, in the order of the lines.

        Raises CancelledError.
        """
        self._cancelled = cancelled
        with self._seen:
            for event in ask(self.runner, self._next, cancelled):
                if isinstance(event, Answered):
                    self._answered(event.asking)
                while self._ready:
                    yield self._ready.popleft()
            yield from self._ready

    def questions(self) -> Iterator[tuple[Task, Sequence[int]]]:
        """Yields each line's task and prompt tokens without running anything."""
        with self._seen:
            for line in self._lines:
                task = self._task(line)
                asking = self._ask(task, line)
                jobs = asking.start(self.runner.check) if asking else ()
                if asking and asking.error:
                    task.error, task.too_long = (
                        asking.error.message,
                        isinstance(asking.error, ContextFullError),
                    )
                yield task, jobs[0].prompt if jobs else ()

    def _next(self) -> Asking | None:
        """Returns the next line's question.

        Lines before it that cannot be asked become error rows at once.
        """
        while (taken := self._take()) is not None:
            task, line = taken
            asking = self._ask(task, line)
            if asking is not None:
                self._tasks[asking] = task
                return asking
            self._failed(task, task.error)
        return None

    def _ask(self, task: Task, line: Item | BadLine) -> Asking | None:
        """Returns the line's question, or None if it has an error."""
        if task.error or isinstance(line, BadLine):
            return None
        settings = self._settings
        try:
            question = question_of(
                line,
                settings,
                self._backend,
                request_key(task.custom_id or ""),
                warn=self._warn,
                cancelled=self._cancelled,
            )
        except EmlocalError as error:
            task.error = error.message
            return None
        task.plan, task.extra = question.plan, dict(line.extra) if settings.keep else {}
        task.tools, task.raw = tool_names(line), line.raw
        return Asking(settings.method.collecting, question)

    def _answered(self, asking: Asking) -> None:
        """Makes the row of a line that was answered or that failed on the way."""
        task, settings = self._tasks.pop(asking), self._settings
        if asking.outcome is None:
            assert asking.error is not None
            self._failed(task, asking.error.message)
            return
        outcome = asking.outcome
        assert task.plan is not None
        name = self._backend.info.name
        answered = answered_line(
            task.key,
            task.custom_id or "",
            name,
            task.plan,
            outcome,
            settings,
            task.extra,
            task.tools,
            task.raw,
        )
        self.tally.answered += 1
        self.tally.cut_off += outcome.completion.finish_reason in ("length", "context")
        self.tally.abstained += bool(answered.abstained)
        self.tally.votes_lost += outcome.undecided
        self._give(task, openai_row(answered) if settings.openai else own_row(answered))


def question_of(
    line: Item,
    settings: BatchSettings,
    backend: Backend,
    key: int,
    *,
    warn: Callable[[str], None],
    cancelled: Callable[[], bool] = never,
) -> Question:
    """What a line asks, with its own settings over the common ones.

    Args:
        key: of the draws.
        warn: takes a text for people.
        cancelled: looked at while the prompt is tokenized.
    Raises EmlocalError for settings that contradict each other.
    """
    plan = overridden(settings.plan, line.overrides)
    chosen = settings.chosen | names_in(line.overrides)
    plan = replace(plan, params=settings.method.params(plan.params, chosen))
    vocabulary = backend.info.vocabulary
    for token, _ in plan.params.logit_bias:
        if token >= vocabulary:
            raise UsageError(f"logit_bias names token {token}; the model has {vocabulary:,}")
    encode = partial(prompt_tokens, backend, cancelled=cancelled, warn=warn)
    return Question(_asked(line, settings, backend, warn), plan, encode, key)


def _asked(line: Item, settings: BatchSettings, backend: Backend, warn: Callable[[str], None]) -> Asked:
    said = said_in(line, system=settings.system, raw=settings.raw)
    if isinstance(said, str):
        return said
    return for_template(backend.info, Dialogue(tuple(said), line.tools) if line.tools else said, warn)


def answered_line(
    key: str,
    custom_id: str,
    model: str,
    plan: Plan,
    outcome: Outcome,
    settings: BatchSettings,
    extra: Mapping[str, object],
    tools: tuple[str, ...] = (),
    raw: bool = False,
) -> AnsweredLine:
    """An outcome with its confidence, and whether it is withheld."""
    subject = subject_of(model, settings.method, plan)
    sure = confidence_of(outcome, subject, settings.calibration)
    least = settings.abstain_below
    abstained = None if least is None else sure is None or sure.value < least
    return AnsweredLine(
        key,
        custom_id,
        model,
        subject.method,
        plan.seed,
        outcome,
        extra,
        settings.entropies,
        sure,
        abstained,
        tools,
        raw,
    )


def tool_names(line: Item) -> tuple[str, ...]:
    """Returns the names of the tools that a line offers."""
    return tuple(tool["function"]["name"] for tool in line.tools or ())
