"""Answers and verdicts of one contender: the batch answers a task's questions and writes a journal.

Questions run in blocks. Each block starts on an empty engine and ends before the next begins. A block that
was interrupted is answered again from its beginning, and the rows that it already wrote are kept. An engine's
floating-point sums depend on what else is computed in the same pass. Only whole blocks give a resumed run the
same answers as an uninterrupted one.

`Judge` stores its verdicts, so a run that is resumed or reported again judges nothing twice.
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
from emlocal.evaluation.tasks.task import Problem, Task, Verdict
from emlocal.generation import Scheduler
from emlocal.generation.prompt import Asked
from emlocal.models.template_traits import traits
from emlocal.text import parse_json

Row = Mapping[str, Any]
_ROUNDS_OF_A_BLOCK = 6.25
"""Samples in a block for each sequence that runs at once: 100 for 16.

More make fewer idle places, because places only stay idle at a block's end. People ask for round numbers of
questions.
"""


@dataclass(frozen=True)
class Answer:
    """One answer to one problem, with its row."""

    problem: Problem
    repetition: int
    """Number of the repetition, from 1."""
    row: Row
    earlier: Mapping[str, str]
    """Texts that the answer builds on, by problem id."""

    @property
    def text(self) -> str:
        """The answer's text; empty if it failed."""
        return str(self.row.get("text", ""))

    @property
    def error(self) -> str | None:
        """The error message, or None if there is an answer."""
        return str(self.row["error"]) if is_error(self.row) else None


def name_of(problem: Problem, repetition: int) -> str:
    """Returns the name of an answer. It determines the draws, so all contenders share them."""
    return f"{problem.id}#{repetition}"


class Answering:
    """One contender's run over a task. The journal must be open, with the same settings."""

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
        """`system` is the system message of each question; `settings` has none."""
        self._backend, self._task, self._settings, self._system = backend, task, settings, system
        self._journal, self._parallel = journal, parallel
        self.repetitions = repetitions
        self._rows: dict[str, Row] = {row["custom_id"]: row for row in _read(journal.path)}
        self._takes_system = takes_system(backend)

    def run(self, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Row]:
        """Answers the open questions; yields each row once it is in the journal.

        A row also has `elapsed`, the seconds since the previous row. Their sum is the time that the answers
        took.

        Raises CancelledError, and the errors of the engine and the journal.
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
        """Number of answers in the whole run."""
        return len(self._task.problems) * self.repetitions

    def answers(self) -> list[Answer]:
        """Returns the answers so far, in the order of the problems."""
        return [
            Answer(problem, k, self._rows[name_of(problem, k)], self._earlier(problem, k))
            for problem, k in self._asked(self._task.problems)
            if name_of(problem, k) in self._rows
        ]

    def _asked(self, problems: Sequence[Problem]) -> list[tuple[Problem, int]]:
        """Returns (problem, repetition) pairs.

        A problem's repetitions are adjacent, so its prompt is read once.
        """
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
    """Returns a question as a prompt or as messages. `takes_system`: see the function of that name."""
    if takes_system is None:
        return f"{system}\n\n{question}\n\n" if system else f"{question}\n\n"
    if system and takes_system:
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]
    return [{"role": "user", "content": f"{system}\n\n{question}" if system else question}]


def takes_system(backend: Backend) -> bool | None:
    """Whether the chat template accepts a system message; None if the model has no template.

    If it does not, `asked_as` puts the system message at the start of the user's message.
    """
    if backend.info.chat_template is None:
        return None
    return traits(backend.info.chat_template, backend.info.bos, backend.info.eos).system == "shown"


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
    """Judges a task's answers.

    Appends each verdict to a file, under the digest of the problem and the answer.

    Two processes may append to the file: lines are short, and an answer with a torn line is judged again.
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
        """Yields the answers with their verdicts, in order; stops early if cancelled."""
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
            ).decode()  # a program may raise any text, even half a surrogate
            self._known[key] = (right, said)
            line = json.dumps({"key": key, "right": right, "said": said}) + "\n"
            self._file.write(line)
            self._file.flush()
        right, said = self._known[key]
        return Verdict("right" if right else "wrong", shown, said or how)

    def close(self) -> None:
        """Closes the file and the task's judging resources."""
        self._file.close()
        self._task.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_torn(path: Path) -> bool:
    """Whether the file's last line lacks its end."""
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
