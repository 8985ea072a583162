"""An evaluation: contenders one after the other over a task's questions, then the judging of all answers.

A contender's answers are a batch output of its own in OUT/answers, so that a run goes on where it stopped,
and contenders can be added to one that is finished.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emlocal.backends.base import Backend
from emlocal.batch.journal import Journal
from emlocal.batch.rows import is_error, key_of
from emlocal.batch.run import BatchSettings
from emlocal.errors import CancelledError
from emlocal.evaluation.answering import Answer, Answering
from emlocal.evaluation.judging import Judge, Judged
from emlocal.evaluation.provenance import note_answering
from emlocal.evaluation.tasks.task import Task

Progress = Callable[[str, int, int], None]
"""Takes what is being done, how many are done, and of how many."""


@dataclass(frozen=True)
class Entry:
    """A contender in an evaluation."""

    name: str
    described: str
    """Its settings in words."""
    settings: BatchSettings
    identity: Mapping[str, object]
    """What a run that goes on must have the same."""
    repetitions: int


def answers_path(folder: Path, name: str) -> Path:
    """Where a contender's answers are."""
    return folder / "answers" / (re.sub(r"[^\w.+=-]", "_", name) + ".jsonl")


def others_in(folder: Path, entries: Sequence[Entry]) -> list[str]:
    """The files of other contenders' answers, by their names without the ending."""
    own = {answers_path(folder, entry.name) for entry in entries}
    return sorted(path.stem for path in (folder / "answers").glob("*.jsonl") if path not in own)


def answer(
    backend: Backend,
    task: Task,
    entries: Sequence[Entry],
    folder: Path,
    *,
    system: str | None,
    parallel: int,
    made_with: Mapping[str, object],
    restart: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, list[Answer]]:
    """Every contender's answers to every question, by the contender's name.

    `made_with` is remembered for those that are answered now.

    Raises CancelledError, UsageError for answers that are there and were made otherwise, and what the engine
    and the journal raise.
    """
    answers_path(folder, "").parent.mkdir(parents=True, exist_ok=True)
    found = {}
    for entry in entries:
        with Journal.open(
            answers_path(folder, entry.name),
            entry.identity,
            key_of=key_of,
            is_error=is_error,
            restart=restart,
        ) as journal:
            running = Answering(
                backend, task, entry.settings, entry.repetitions, journal, parallel, system=system
            )
            there = len(running.answers())
            progress(entry.name, there, running.total)
            if there < running.total:
                note_answering(folder, entry.name, made_with)
            for done, _ in enumerate(running.run(cancelled), there + 1):
                progress(entry.name, done, running.total)
            found[entry.name] = running.answers()
    return found


def judge(
    task: Task,
    answers: Mapping[str, Sequence[Answer]],
    folder: Path,
    *,
    restart: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, list[Judged]]:
    """The verdicts on all answers, with `restart` all made anew.

    Raises CancelledError, and what the task's judging raises.
    """
    verdicts = folder / "verdicts.jsonl"
    if restart:
        verdicts.unlink(missing_ok=True)
    total, done = sum(map(len, answers.values())), 0
    found: dict[str, list[Judged]] = {}
    with Judge(task, verdicts) as judge:
        for name, given in answers.items():
            found[name] = []
            for judged in judge.judge(given, cancelled):
                found[name].append(judged)
                done += 1
                progress("judging", done, total)
            if cancelled():
                raise CancelledError
    return found
