"""From lines to rows: what each line asks becomes a job, what comes of it becomes a row.

Everything streams: a line is read when a place for it is free, and forgotten when its row is out.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from emlocal.backends.base import Backend
from emlocal.batch.keys import Keys, Places
from emlocal.batch.lines import BadLine, Item, digest
from emlocal.batch.rows import Answered, Row, error_row, openai_row, own_row
from emlocal.errors import ContextFullError, EmlocalError, UsageError
from emlocal.generation import Request
from emlocal.generation.prompt import chat_tokens, with_system
from emlocal.generation.scheduler import Finished, Job, Scheduler
from emlocal.generation.tokenizing import never, text_tokens
from emlocal.methods.method import REVISE, Method, name_of
from emlocal.models.templates import Message
from emlocal.sampling import Uniforms
from emlocal.sampling.draw import request_key
from emlocal.settings import Plan
from emlocal.settings.resolve import names_in, overridden

AHEAD = 1024
"""With `ordered`, how many rows may wait for an earlier one; then no more lines are taken."""
_DRAWS_OF_A_ROUND = 1 << 20  # sample indices apart: a revision's draws are its own


@dataclass(frozen=True)
class BatchSettings:
    """What holds for every line, where it does not say otherwise."""

    plan: Plan
    method: Method = field(default_factory=Method)
    chosen: frozenset[str] = frozenset()
    """Sampling fields that were set on purpose, which the method leaves alone."""
    system: str | None = None
    """For lines without a system message of their own."""
    raw: bool = False
    keep: bool = False
    openai: bool = False
    ordered: bool = False
    entropies: bool = False
    """Rows have the entropy of each token of the answer, nats."""
    fingerprint: str = ""
    """What else makes two runs different: model, adapters."""


@dataclass
class Tally:
    """Of the lines so far."""

    answered: int = 0
    errors: int = 0
    skipped: int = 0
    """Already in the output."""
    cut_off: int = 0
    """Answered, but ended by --max-tokens or the context."""
    votes_lost: int = 0
    """Self-consistency found no answer in any sample."""


@dataclass
class Task:
    """A line on its way."""

    key: str
    custom_id: str | None
    line: int
    order: int
    error: str = ""
    too_long: bool = False
    """The error is that the prompt cannot fit the context."""
    plan: Plan | None = None
    messages: Sequence[Message] | None = None
    prompt: str = ""
    extra: dict[str, object] = field(default_factory=dict)
    rounds: list[Finished["Task"]] = field(default_factory=list)


class Batch:
    """One run over lines. `rows` may be called once."""

    def __init__(
        self,
        backend: Backend,
        lines: Iterable[Item | BadLine],
        settings: BatchSettings,
        *,
        parallel: int,
        done: Keys | None = None,
        places: Places | None = None,
    ) -> None:
        """`done`: keys of rows that exist; their lines are passed over. `places` takes the keys of all lines,
        in their order."""
        self.scheduler: Scheduler[Task] = Scheduler(backend, parallel)
        self.tally = Tally()
        self._backend = backend
        self._settings = settings
        self._lines = iter(lines)
        self._done = done
        self._places = places
        self._seen = Keys()
        self._follow_ups: deque[Job[Task]] = deque()
        self._cancelled: Callable[[], bool] = never
        self._taken = self._given = 0
        self._held: dict[int, Row] = {}  # with `ordered`: rows that wait for earlier ones

    def rows(self, cancelled: Callable[[], bool] = never) -> Iterator[Row]:
        """The rows as they are finished, or in the order of the lines. Raises CancelledError."""
        self._cancelled = cancelled
        with self._seen:
            for finished in self.scheduler.run(self._next_job, cancelled):
                row = self._row(finished)
                if row is None:
                    continue
                if not self._settings.ordered:
                    yield row
                    continue
                self._held[finished.job.tag.order] = row
                while self._given in self._held:
                    self._given += 1
                    yield self._held.pop(self._given - 1)

    def questions(self) -> Iterator[tuple["Task", Sequence[int]]]:
        """Each line as it would be asked, with its prompt's tokens; nothing is run."""
        with self._seen:
            for line in self._lines:
                task = self._task(line)
                yield task, self._job(task, line).prompt

    def _next_job(self) -> Job[Task] | None:
        if self._follow_ups:
            return self._follow_ups.popleft()
        if self._settings.ordered and self._taken - self._given > AHEAD:
            return None  # the one that all wait for is being worked on
        for line in self._lines:
            task = self._task(line)
            if self._places is not None:
                self._places.add(task.key)
            if self._done is not None and task.key in self._done:
                self.tally.skipped += 1
                continue
            self._taken += 1
            return self._job(task, line)
        return None

    def _task(self, line: Item | BadLine) -> Task:
        """The line under its name; a name given twice makes it an error."""
        bad = isinstance(line, BadLine)
        content = line.content if isinstance(line, BadLine) else line.content()
        named = line.custom_id if line.custom_id is not None and not bad else None
        own = digest("bad" if bad else "line", content)[:16]
        times = self._seen.add(f"id {named}" if named is not None else f"content {own}")
        custom_id = named if named is not None else own if times == 1 else f"{own}-{times}"
        # Where a given name is the very hash that names the same content without a name, the second of the
        # two lines gets a key of its own. Other keys are those of earlier versions: their outputs go on.
        twin = (f"id {own}" if named is None else f"content {own}") if custom_id == own else None
        both = ("given" if named is not None else "made",) if twin is not None and twin in self._seen else ()
        key = digest(custom_id, content, str(times), self._settings.fingerprint, *both)
        task = Task(key, line.custom_id if bad else custom_id, line.line, self._taken)
        if isinstance(line, BadLine):
            task.error = line.message
        elif named is not None and times > 1:
            task.error = f"the custom_id {named!r} is that of an earlier line"
        return task

    def _job(self, task: Task, line: Item | BadLine) -> Job[Task]:
        """The line's first job; one that the scheduler refuses where there is an error."""
        if task.error or isinstance(line, BadLine):
            return Job(task, (), ())
        settings = self._settings
        try:
            plan = overridden(settings.plan, line.overrides)
            chosen = settings.chosen | names_in(line.overrides)
            plan = replace(plan, params=settings.method.params(plan.params, chosen))
            vocabulary = self._backend.info.vocabulary
            for token, _ in plan.params.logit_bias:
                if token >= vocabulary:
                    raise UsageError(f"logit_bias names token {token}; the model has {vocabulary:,}")
            task.plan, task.extra = plan, dict(line.extra) if settings.keep else {}
            if line.messages is not None:
                task.messages = with_system(line.messages, self._settings.system)
            elif line.raw or settings.raw or self._backend.info.chat_template is None:
                task.prompt = line.prompt or ""
            else:
                task.messages = with_system(
                    [{"role": "user", "content": line.prompt or ""}], self._settings.system
                )
            return self._ask(task)
        except EmlocalError as error:
            task.error, task.too_long = error.message, isinstance(error, ContextFullError)
            return Job(task, (), ())

    def _ask(self, task: Task) -> Job[Task]:
        """A job for the task's question as it stands. Raises UsageError, ModelError of the template."""
        plan = task.plan
        assert plan is not None
        if task.messages is not None:
            tokens = chat_tokens(self._backend, task.messages, self._cancelled)
        else:
            tokens = text_tokens(
                self._backend, task.prompt, add_special=True, parse_special=True, cancelled=self._cancelled
            )
        first = len(task.rounds) * _DRAWS_OF_A_ROUND
        key = request_key(task.custom_id or "")
        return Job(
            task,
            tokens,
            [
                Request(plan.params, Uniforms(plan.seed, key, first + i), plan.max_tokens, plan.stop)
                for i in range(plan.samples)
            ],
        )

    def _row(self, finished: Finished[Task]) -> Row | None:
        """The row of a finished job; None where the line goes on."""
        task, settings = finished.job.tag, self._settings
        error = finished.error
        if task.error or (error is not None and not (task.rounds and isinstance(error, ContextFullError))):
            self.tally.errors += 1
            said = task.error or (error.message if error else "")
            return error_row(task.key, task.custom_id, task.line, said, openai=settings.openai)
        if error is None:  # else the revision did not fit: the answer stands as it was
            task.rounds.append(finished)
            if len(task.rounds) <= settings.method.revisions and self._revise(task):
                return None
        assert task.plan is not None
        completions = task.rounds[-1].completions
        answered = Answered(
            task.key,
            task.custom_id or "",
            self._backend.info.name,
            settings.method.name or name_of(task.plan.params),
            task.plan.seed,
            task.rounds,
            settings.method.pick([c.text for c in completions]),
            task.extra,
            settings.entropies,
        )
        self.tally.answered += 1
        self.tally.cut_off += answered.chosen.finish_reason in ("length", "context")
        self.tally.votes_lost += answered.vote is not None and answered.vote.index is None
        return openai_row(answered) if settings.openai else own_row(answered)

    def _revise(self, task: Task) -> bool:
        """Ask for a better answer; False where the template does not take the longer conversation."""
        answer = task.rounds[-1].completions[0].text
        if task.messages is not None:
            task.messages = self._settings.method.follow_up(task.messages, answer)
        else:
            task.prompt = f"{task.prompt}{answer}\n\n{REVISE}\n\n"
        try:
            self._follow_ups.append(self._ask(task))
        except EmlocalError:
            return False
        return True
