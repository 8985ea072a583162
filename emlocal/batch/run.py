"""From lines to rows: what each line asks is answered by a method, what comes of it becomes a row.

Everything streams: a line is read when a place for it is free, and forgotten when its row is out.

Beside it: how many sequences to decode at once, as more are faster until the processor, not the memory, is
the limit; and what a batch would be, without running it: each line checked, its tokens counted, the time
estimated.
"""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from emlocal.backends.base import Backend, Feed
from emlocal.batch.keys import Keys, Places
from emlocal.batch.lines import AnsweredLine, BadLine, Item, Row, digest, error_row, openai_row, own_row
from emlocal.cancel import never
from emlocal.errors import ContextFullError, EmlocalError, UsageError
from emlocal.generation import Runner, Scheduler
from emlocal.generation.prompt import Asked, for_template, prompt_tokens, with_system
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.methods import Chosen
from emlocal.methods.asking import Answered, Asking, Question, ask
from emlocal.methods.confidence import Calibration, confidence_of, subject_of
from emlocal.models.templates import Message
from emlocal.sampling.draw import request_key
from emlocal.settings import Plan
from emlocal.settings.resolve import names_in, overridden

AHEAD = 1024
"""With `ordered`, how many rows may wait for an earlier one; then no more lines are taken."""


@dataclass(frozen=True)
class BatchSettings:
    """What holds for every line, where it does not say otherwise."""

    plan: Plan
    method: Chosen = field(default_factory=Chosen)
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
    calibration: Calibration | None = None
    abstain_below: float | None = None
    """Answers with less confidence are withheld."""
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
    abstained: int = 0
    """Answered, but not sure enough."""
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
    extra: dict[str, object] = field(default_factory=dict)


class Batch:
    """One run over lines. `rows` may be called once."""

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
        """`done`: keys of rows that exist: their lines are passed over. `places` takes the keys of all lines,
        in their order, `warn` a text for people."""
        self.runner = runner
        self.tally = Tally()
        self._backend = backend
        self._settings = settings
        self._lines = iter(lines)
        self._done = done
        self._places = places
        self._seen = Keys()
        self._cancelled: Callable[[], bool] = never
        self._warn, self._warned = warn, False
        self._tasks: dict[Asking, Task] = {}
        self._ready: deque[Row] = deque()
        self._taken = self._given = 0
        self._held: dict[int, Row] = {}  # with `ordered`: rows that wait for earlier ones

    @property
    def abstain_below(self) -> float | None:
        """Answers with less confidence are withheld."""
        return self._settings.abstain_below

    def rows(self, cancelled: Callable[[], bool] = never) -> Iterator[Row]:
        """The rows as they are finished, or in the order of the lines. Raises CancelledError."""
        self._cancelled = cancelled
        with self._seen:
            for event in ask(self.runner, self._next, cancelled):
                if isinstance(event, Answered):
                    self._answered(event.asking)
                while self._ready:
                    yield self._ready.popleft()
            yield from self._ready

    def questions(self) -> Iterator[tuple[Task, Sequence[int]]]:
        """Each line as it would be asked, with its prompt's tokens; nothing is run."""
        with self._seen:
            for line in self._lines:
                task = self._task(line)
                asking = self._ask(task, line)
                jobs = asking.start(lambda job: None) if asking else ()
                if asking and asking.error:
                    task.error, task.too_long = (
                        asking.error.message,
                        isinstance(asking.error, ContextFullError),
                    )
                yield task, jobs[0].prompt if jobs else ()

    def _next(self) -> Asking | None:
        """The next line's question; lines before it that cannot be asked are rows at once."""
        while not (self._settings.ordered and self._taken - self._given > AHEAD):
            line = next(self._lines, None)
            if line is None:
                return None
            task = self._task(line)
            if self._places is not None:
                self._places.add(task.key)
            if self._done is not None and task.key in self._done:
                self.tally.skipped += 1
                continue
            self._taken += 1
            asking = self._ask(task, line)
            if asking is not None:
                self._tasks[asking] = task
                return asking
            self._failed(task, task.error)
        return None  # the one that all wait for is being worked on

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

    def _ask(self, task: Task, line: Item | BadLine) -> Asking | None:
        """What the line asks; None where it has an error."""
        if task.error or isinstance(line, BadLine):
            return None
        settings = self._settings
        try:
            plan = overridden(settings.plan, line.overrides)
            chosen = settings.chosen | names_in(line.overrides)
            plan = replace(plan, params=settings.method.params(plan.params, chosen))
            vocabulary = self._backend.info.vocabulary
            for token, _ in plan.params.logit_bias:
                if token >= vocabulary:
                    raise UsageError(f"logit_bias names token {token}; the model has {vocabulary:,}")
            asked = self._asked(line)
        except EmlocalError as error:
            task.error = error.message
            return None
        task.plan, task.extra = plan, dict(line.extra) if settings.keep else {}
        encode = partial(prompt_tokens, self._backend, cancelled=self._cancelled)
        question = Question(asked, plan, encode, request_key(task.custom_id or ""))
        return Asking(settings.method.collecting, question)

    def _asked(self, line: Item) -> Asked:
        messages: Sequence[Message] | None = line.messages
        if messages is None:
            if line.raw or self._settings.raw:
                return line.prompt or ""
            messages = [{"role": "user", "content": line.prompt or ""}]
        return for_template(self._backend.info, with_system(messages, self._settings.system), self._warn_once)

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(text)

    def _answered(self, asking: Asking) -> None:
        """A line is answered, or failed on the way."""
        task, settings = self._tasks.pop(asking), self._settings
        if asking.outcome is None:
            assert asking.error is not None
            self._failed(task, asking.error.message)
            return
        outcome = asking.outcome
        assert task.plan is not None
        subject = subject_of(self._backend.info.name, settings.method, task.plan)
        sure = confidence_of(outcome, subject, settings.calibration)
        least = settings.abstain_below
        abstained = None if least is None else sure is None or sure.value < least
        answered = AnsweredLine(
            task.key,
            task.custom_id or "",
            self._backend.info.name,
            subject.method,
            task.plan.seed,
            outcome,
            task.extra,
            settings.entropies,
            sure,
            abstained,
        )
        self.tally.answered += 1
        self.tally.cut_off += outcome.completion.finish_reason in ("length", "context")
        self.tally.abstained += bool(abstained)
        self.tally.votes_lost += outcome.undecided
        self._give(task, openai_row(answered) if settings.openai else own_row(answered))

    def _failed(self, task: Task, why: str) -> None:
        self.tally.errors += 1
        self._give(task, error_row(task.key, task.custom_id, task.line, why, openai=self._settings.openai))

    def _give(self, task: Task, row: Row) -> None:
        """Hand a row out, with `ordered` once all before it are."""
        if not self._settings.ordered:
            self._ready.append(row)
            return
        self._held[task.order] = row
        while self._given in self._held:
            self._given += 1
            self._ready.append(self._held.pop(self._given - 1))


ENOUGH = 0.95
"""The fewest sequences that reach this share of the best speed are chosen: they need less memory."""
_FALLING = 0.7  # of the best speed: more sequences will not help. Two are often no faster than one.
_STEPS = 2  # timed for each number, after one that is not


class Speed(NamedTuple):
    """What so many sequences at once gave."""

    sequences: int
    tokens_per_second: float


def measure_parallel(backend: Backend, most: int, *, seconds: float = 4.0) -> list[Speed]:
    """Decode a few tokens of 1, 2, 4, … `most` sequences; stops where more do not help, or time is up."""
    started, speeds = time.perf_counter(), list[Speed]()
    most = min(most, backend.max_sequences - SPARE_SEQUENCES)
    token = min(100, backend.info.vocabulary - 1)
    open_sequences: list[int] = []
    n = 1
    try:
        while True:
            open_sequences += [backend.open() for _ in range(n - len(open_sequences))]
            feeds = [Feed(sequence, (token,)) for sequence in open_sequences]
            backend.forward(feeds)
            began = time.perf_counter()
            for _ in range(_STEPS):
                backend.forward(feeds)
            took = time.perf_counter() - began
            speeds.append(Speed(n, _STEPS * n / took))
            fastest = max(s.tokens_per_second for s in speeds)
            falling = speeds[-1].tokens_per_second < _FALLING * fastest
            if n == most or falling or time.perf_counter() - started + 2 * took > seconds:
                return speeds
            n = min(2 * n, most)
    finally:
        for sequence in open_sequences:
            backend.release(sequence)


def best_parallel(speeds: list[Speed]) -> int:
    """The fewest sequences that are nearly as fast as the fastest."""
    fastest = max(speed.tokens_per_second for speed in speeds)
    return min(s.sequences for s in speeds if s.tokens_per_second >= ENOUGH * fastest)


_PROBE_TOKENS = 128  # read once, to time the reading of prompts
_SHOWN = 10  # bad lines that are shown


@dataclass
class Survey:
    """What the lines ask for. Tokens and seconds."""

    lines: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    """(line, what is wrong), the first few."""
    bad_lines: int = 0
    refused: int = 0
    """Prompts that do not fit the context."""
    may_be_cut_off: int = 0
    """Prompts after which less than --max-tokens fit."""
    prompts: Counter[int] = field(default_factory=Counter)
    """Prompt lengths; a count per length, so that a million lines take no memory."""
    most_generated: int = 0
    """Tokens, if every answer is as long as it may be."""
    reading_seconds: float = 0.0
    longest_seconds: float = 0.0
    """Reading, and answers as long as they may be."""

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts that fit."""
        return sum(length * n for length, n in self.prompts.items())

    def quantile(self, q: float) -> int:
        """The prompt length that a share q of the prompts does not exceed."""
        left = q * sum(self.prompts.values())
        for length in sorted(self.prompts):
            left -= self.prompts[length]
            if left <= 0:
                return length
        return max(self.prompts, default=0)


def survey(
    backend: Backend,
    lines: Iterable[Item | BadLine],
    settings: BatchSettings,
    *,
    speed: Speed,
    progress: Callable[[int], None] = lambda lines: None,
) -> Survey:
    """Check every line as a run would; revisions of refinement are not counted."""
    found = Survey()
    batch = Batch(backend, lines, settings, runner=Scheduler(backend, speed.sequences))
    for task, prompt in batch.questions():
        found.lines += 1
        progress(found.lines)
        if task.too_long:
            found.refused += 1
            continue
        if task.error or task.plan is None:
            found.bad_lines += 1
            if len(found.bad) < _SHOWN:
                found.bad.append((task.line, task.error))
            continue
        room = backend.context - len(prompt)
        if room < 1:
            found.refused += 1
            continue
        found.prompts[len(prompt)] += 1
        found.may_be_cut_off += room < task.plan.max_tokens
        found.most_generated += min(room, task.plan.max_tokens) * task.plan.samples
    found.reading_seconds = found.prompt_tokens / _reading_speed(backend)
    found.longest_seconds = found.reading_seconds + found.most_generated / speed.tokens_per_second
    return found


def _reading_speed(backend: Backend) -> float:
    """Prompt tokens a second."""
    tokens = [i % backend.info.vocabulary for i in range(100, 100 + min(_PROBE_TOKENS, backend.context))]
    sequence = backend.open()
    seconds = []
    try:
        for _ in range(2):
            backend.trim(sequence, 0)
            started = time.perf_counter()
            backend.forward([Feed(sequence, tokens, wanted=False)])
            seconds.append(time.perf_counter() - started)
    finally:
        backend.release(sequence)
    return len(tokens) / max(statistics.fmean(seconds), 1e-9)
