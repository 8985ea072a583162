"""Verdicts on answers, remembered: a run that goes on, or is reported again, judges nothing twice."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from emlocal.evaluation.answering import Answer
from emlocal.evaluation.tasks.task import Task, Verdict
from emlocal.text import parse_json


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
        self._known = dict(_read(path))
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


def _read(path: Path) -> Iterator[tuple[str, tuple[bool, str]]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                value = parse_json(line)
                yield value["key"], (bool(value["right"]), str(value["said"]))
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash
