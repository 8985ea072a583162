"""What a vote had to vote on: the samples within self-consistency's answers, judged one by one.

Reads the folder of an evaluation, answers nothing. For each voting method: the mean accuracy of its samples,
the share of questions with a right sample, the vote's accuracy, and how many distinct answers and texts a
question's samples have. Differences are paired by question. Brackets are 95 %, BCa bootstrap.

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

from emlocal.evaluation.answering import Answer, name_of
from emlocal.evaluation.judging import Judge
from emlocal.evaluation.run import answers_path
from emlocal.evaluation.statistics import bootstrap_mean
from emlocal.evaluation.tasks.open import open_task
from emlocal.evaluation.tasks.task import Task
from emlocal.methods.answers import canonical


@dataclass(frozen=True)
class Votes:
    """One value a question."""

    vote: list[float]
    """Whether the vote is right."""
    single: list[float]
    """The share of its samples that are."""
    any: list[float]
    """Whether one of them is."""
    answers: list[float]
    """Distinct answers among its samples; texts without one are one more."""
    texts: list[float]


def votes(task: Task, folder: Path, method: str) -> Votes:
    """The judged samples of a method. Verdicts are kept where the evaluation keeps them."""
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


def percent(values: Sequence[float]) -> str:
    """The mean and its 95 % interval, in percent."""
    ends = bootstrap_mean(values)
    return f"{100 * fmean(values):.1f} [{100 * ends.low:.1f}, {100 * ends.high:.1f}]"


def minus(some: Sequence[float], others: Sequence[float]) -> str:
    """The paired difference."""
    return percent([a - b for a, b in zip(some, others, strict=True)])


def main() -> None:
    """Print a row for each method, with its differences to the first."""
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
    first = found[names[0]]
    heads = ("method", "a sample, %", "− first's", "any sample, %", "− first's", "vote, %", "vote − sample")
    rows = [
        (
            f"`{name}`",
            percent(one.single),
            "" if one is first else minus(one.single, first.single),
            percent(one.any),
            "" if one is first else minus(one.any, first.any),
            percent(one.vote),
            minus(one.vote, one.single),
            f"{fmean(one.answers):.2f}",
            f"{fmean(one.texts):.2f}",
        )
        for name, one in found.items()
    ]
    report({}, (*heads, "answers", "texts"), rows, as_json=False)


if __name__ == "__main__":
    main()
