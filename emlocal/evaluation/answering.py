"""A task's questions, answered by one contender through the batch, into a journal.

Questions go in blocks, each of which begins with an empty engine and ends before the next. A block that was
cut short is answered anew from its beginning, and what was there of it is kept: an engine's sums depend on
what is computed in the same pass, so only then are a killed run's answers those of one that was not.

Verdicts on answers, remembered: a run that goes on, or is reported again, judges nothing twice.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from emlocal.backends.base import Backend
from emlocal.batch.journal import Journal
from emlocal.batch.lines import Item, is_error
from emlocal.batch.run import Batch, BatchSettings
from emlocal.errors import UsageError
from emlocal.evaluation.tasks.task import Problem, Task, Verdict
from emlocal.generation import Scheduler
from emlocal.generation.prompt import Asked, chat_tokens
from emlocal.text import parse_json

Row = Mapping[str, Any]
_ROUNDS_OF_A_BLOCK = 6.25
"""So many times more samples than run at once, 100 for 16: at a block's end places are empty. People ask for
round numbers of questions."""


@dataclass(frozen=True)
class Answer:
    """One answer to one problem, as its row has it."""

    problem: Problem
    repetition: int
    """From 1."""
    row: Row
    earlier: Mapping[str, str]
    """Texts that it built on, by problem id."""

    @property
    def text(self) -> str:
        """Empty where it failed."""
        return str(self.row.get("text", ""))

    @property
    def error(self) -> str | None:
        """Why there is none."""
        return str(self.row["error"]) if is_error(self.row) else None


def name_of(problem: Problem, repetition: int) -> str:
    """The name of an answer: it addresses the draws, so that all contenders share them."""
    return f"{problem.id}#{repetition}"


class Answering:
    """One contender's run over a task. The journal is open, and its settings are these."""

    def __init__(
        self,
        backend: Backend,
        task: Task,
        settings: BatchSettings,
        repetitions: int,
        journal: Journal,
        parallel: int,
        system: str | None,
    ) -> None:
        """`system`: said before each question; `settings` has none of its own."""
        self._backend, self._task, self._settings, self._system = backend, task, settings, system
        self._journal, self._parallel = journal, parallel
        self.repetitions = repetitions
        self._rows: dict[str, Row] = {row["custom_id"]: row for row in _read(journal.path)}
        self._takes_system = takes_system(backend)

    def run(self, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Row]:
        """Answer what is not answered, yielding each row once it is in the journal.

        A row has the seconds since the one before besides; their sum is the time that the answers took.

        Raises CancelledError, and what the engine and the journal raise.
        """
        for stage in self._task.stages():
            asked = self._asked(stage)
            size = max(1, int(_ROUNDS_OF_A_BLOCK * self._parallel) // self._settings.plan.samples)
            for start in range(0, len(asked), size):
                block = asked[start : start + size]
                if any(name_of(problem, k) not in self._rows for problem, k in block):
                    yield from self._answer(block, cancelled)

    def _answer(self, block: Sequence[tuple[Problem, int]], cancelled: Callable[[], bool]) -> Iterator[Row]:
        items = [self._item(problem, k, line) for line, (problem, k) in enumerate(block, 1)]
        last = time.perf_counter()
        with Scheduler(self._backend, self._parallel) as runner:
            for row in Batch(self._backend, iter(items), self._settings, runner=runner).rows(cancelled):
                now = time.perf_counter()
                timed = {**row, "elapsed": round(now - last, 4)}
                last = now
                if timed["custom_id"] not in self._rows:
                    self._journal.append(timed)
                    self._rows[timed["custom_id"]] = timed
                    yield timed

    @property
    def total(self) -> int:
        """Answers that the whole run has."""
        return len(self._task.problems) * self.repetitions

    def answers(self) -> list[Answer]:
        """Those that are there, in the order of the problems."""
        return [
            Answer(problem, k, self._rows[name_of(problem, k)], self._earlier(problem, k))
            for problem, k in self._asked(self._task.problems)
            if name_of(problem, k) in self._rows
        ]

    def _asked(self, problems: Sequence[Problem]) -> list[tuple[Problem, int]]:
        """Repetitions of a problem follow one another: its prompt is then read once."""
        return [(problem, k) for problem in problems for k in range(1, self.repetitions + 1)]

    def _item(self, problem: Problem, repetition: int, line: int) -> Item:
        question = self._task.ask(problem, self._earlier(problem, repetition))
        name, asked = name_of(problem, repetition), asked_as(question, self._system, self._takes_system)
        if isinstance(asked, str):
            return Item(line, name, None, asked)
        return Item(line, name, tuple(asked), None)

    def _earlier(self, problem: Problem, repetition: int) -> dict[str, str]:
        whole = self._task.whole(problem)
        if whole == problem.id:
            return {}
        names = {
            other.id: name_of(other, repetition)
            for other in self._task.problems
            if self._task.whole(other) == whole
        }
        return {
            id_: str(self._rows[name].get("text", "")) for id_, name in names.items() if name in self._rows
        }


def asked_as(question: str, system: str | None, takes_system: bool | None) -> Asked:
    """A question as it is asked. `takes_system`: see the function of that name."""
    if takes_system is None:
        return f"{system}\n\n{question}\n\n" if system else f"{question}\n\n"
    if system and takes_system:
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return [{"role": "user", "content": f"{system}\n\n{question}" if system else question}]


def takes_system(backend: Backend) -> bool | None:
    """Whether the chat template takes a system message; None where there is no template.

    Where it does not, what it would say comes first in the user's message.
    """
    if backend.info.chat_template is None:
        return None
    try:
        chat_tokens(
            backend, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
        )
    except UsageError:
        return False
    return True


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


@dataclass(frozen=True)
class Judged:
    """An answer with its verdict."""

    answer: Answer
    verdict: Verdict


class Judge:
    """Judges a task's answers. Verdicts are appended to a file, by the digest of what was judged.

    Two processes may append to it: lines are short, and one that is torn is judged again.
    """

    def __init__(self, task: Task, path: Path) -> None:
        self._task = task
        self._known = dict(_read_verdict(path))
        self._file = path.open("a", encoding="utf-8")
        if _is_torn(path):
            self._file.write("\n")

    def judge(
        self, answers: Iterable[Answer], cancelled: Callable[[], bool] = lambda: False
    ) -> Iterator[Judged]:
        """The answers with their verdicts, in their order; fewer, where it is cancelled."""
        for answer in answers:
            if cancelled():
                return
            yield Judged(answer, self._verdict(answer))

    def _verdict(self, answer: Answer) -> Verdict:
        if answer.error is not None:
            return Verdict("no answer", None, answer.error)
        found = self._task.find(answer.problem, answer.text, answer.earlier)
        if found is None:
            return Verdict("no answer")
        what, how = found
        shown = None if self._task.runs_code else what
        key = self._task.digest(answer.problem, what)
        if key not in self._known:
            right, said = self._task.check(answer.problem, what)
            said = said.encode(
                errors="replace"
            ).decode()  # a program may raise any text, half a surrogate too
            self._known[key] = (right, said)
            line = json.dumps({"key": key, "right": right, "said": said}) + "\n"
            self._file.write(line)
            self._file.flush()
        right, said = self._known[key]
        return Verdict("right" if right else "wrong", shown, said or how)

    def close(self) -> None:
        """Close the file and what the task's judging holds."""
        self._file.close()
        self._task.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_torn(path: Path) -> bool:
    """Whether its last line has no end."""
    return path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")


def _read_verdict(path: Path) -> Iterator[tuple[str, tuple[bool, str]]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                value = parse_json(line)
                yield value["key"], (bool(value["right"]), str(value["said"]))
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash
