"""Judges the samples behind self-consistency's answers one by one: what each vote had to vote on.

Reads the folder of an evaluation and answers nothing; new verdicts are added to it. For each voting method it
prints the mean accuracy of a single sample, the share of questions that any sample gets right, the vote's
accuracy, the vote's gain over a sample, and the mean number of different answers (as votes count them) and
texts. Then come the differences of the other methods to the first, paired by question. Brackets are 95 % BCa
bootstrap intervals; p comes from random sign flips. Nothing is adjusted for multiple comparisons.

    python benchmarks/votes.py gsm8k-qwen --task gsm8k --data gsm8k/test.jsonl --limit 300 \\
        --methods self-consistency:4,em-inf+self-consistency:4
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from common import report

from emlocal.answers.meaning import canonical
from emlocal.evaluation.answering import Answer, Judge, name_of
from emlocal.evaluation.report.texts import p_value
from emlocal.evaluation.runner import answers_path
from emlocal.evaluation.statistics import bootstrap_mean, sign_flip
from emlocal.evaluation.tasks import open_task
from emlocal.evaluation.tasks.task import Task


@dataclass(frozen=True)
class Votes:
    """Figures of a voting method, one value for each question."""

    vote: list[float]
    """Whether the vote is right."""
    single: list[float]
    """Share of right samples."""
    any: list[float]
    """Whether any sample is right."""
    answers: list[float]
    """Number of distinct answers among the samples; all texts without an answer count as one more."""
    texts: list[float]

    @property
    def gained(self) -> list[float]:
        """The vote's gain over one of its samples."""
        return minus(self.vote, self.single)


def votes(task: Task, folder: Path, method: str) -> Votes:
    """Judges the samples of a method. The verdicts are stored with those of the evaluation."""
    lines = answers_path(folder, method).read_text(encoding="utf-8").splitlines()
    rows = {row["custom_id"]: row for row in map(json.loads, lines)}
    found = Votes([], [], [], [], [])
    with Judge(task, folder / "verdicts.jsonl") as judge:
        for problem in task.problems:
            row = rows[name_of(problem, 1)]
            texts = [sample["text"] for sample in row["samples"]]
            given = [Answer(problem, 1, {"text": text}, {}) for text in (row["text"], *texts)]
            vote, *right = (float(judged.verdict.right) for judged in judge.judge(given))
            answers = [task.find(problem, text, {}) for text in texts]
            found.vote.append(vote)
            found.single.append(fmean(right))
            found.any.append(max(right))
            found.answers.append(len({a and canonical(a[0]) for a in answers}))
            found.texts.append(len(set(texts)))
    return found


def percent(values: Sequence[float], sign: str = "") -> str:
    """Formats the mean and its 95 % interval, in percent."""
    ends = bootstrap_mean(values)
    mean, low, high = (f"{100 * x:{sign}.1f}" for x in (fmean(values), ends.low, ends.high))
    return f"{mean} [{low}, {high}]".replace("-", "−")


def minus(some: Sequence[float], others: Sequence[float]) -> list[float]:
    """Returns the paired differences."""
    return [a - b for a, b in zip(some, others, strict=True)]


def compared(some: Sequence[float], others: Sequence[float]) -> str:
    """Formats the mean of the paired differences, in percentage points, with its p."""
    differences = minus(some, others)
    return f"{percent(differences, '+')}, p {p_value(sign_flip(differences))}"


def rows(found: dict[str, Votes]) -> list[tuple[str, ...]]:
    """Returns a row for each method, and one for its differences to the first."""
    lines = []
    first = next(iter(found.values()))
    for name, one in found.items():
        means = (percent(one.single), percent(one.any), percent(one.vote))
        counts = (f"{fmean(one.answers):.2f}", f"{fmean(one.texts):.2f}")
        lines.append((f"`{name}`", *means, percent(one.gained, "+"), *counts))
        if one is not first:
            pairs = [(one.single, first.single), (one.any, first.any), (one.vote, first.vote)]
            pairs.append((one.gained, first.gained))
            lines.append(("difference", *(compared(a, b) for a, b in pairs), "", ""))
    return lines


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--methods", required=True)
    chosen = parser.parse_args()
    task = open_task(chosen.task, chosen.data, chosen.limit, None, None)
    names = chosen.methods.split(",")
    found = {name: votes(task, chosen.folder, name) for name in names}
    heads = ("method", "a sample, %", "any of them, %", "the vote, %", "vote − sample", "answers", "texts")
    report({}, heads, rows(found), as_json=False)


if __name__ == "__main__":
    main()
