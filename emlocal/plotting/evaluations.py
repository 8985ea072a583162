"""Evaluations of `emlocal eval`, by their results.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emlocal.evaluation.report.reading import Results, read_results
from emlocal.formatting import counted
from emlocal.plotting.reading import labels


@dataclass(frozen=True)
class Evaluation:
    """An evaluation and what it is called among others."""

    label: str
    results: Results

    def describe(self) -> str:
        """Task and model: accuracies of different ones are not to be compared."""
        found = self.results
        return f"{found.task}, {counted(found.problems, 'problem')}, {found.model}"


def read_evaluations(paths: Sequence[Path]) -> list[Evaluation]:
    """The evaluations of these results.json, labelled by as much of their folders as tells them apart.

    Raises UsageError for what is no results.json, is of another version, or damaged.
    """
    folders = [path.parent if path.name == "results.json" else path for path in paths]
    pairs = zip(labels(folders, "an evaluation"), paths, strict=True)
    return [Evaluation(label, read_results(path)) for label, path in pairs]


def accuracy_name(evaluations: Sequence[Evaluation]) -> str:
    """ "accuracy", or "mean@4" where all have as many answers to each question."""
    ks = {max(standing.repetitions for standing in each.results.standings) for each in evaluations}
    return "accuracy" if len(ks) > 1 or ks == {1} else f"mean@{ks.pop()}"
