"""Everything that there is to report of an evaluation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emlocal.evaluation.judging import Judged
from emlocal.evaluation.results import Comparison, MethodResult
from emlocal.evaluation.tasks.task import Task
from emlocal.files import atomic_writer

FORMAT = "emlocal-eval-1"


@dataclass(frozen=True)
class Document:
    """An evaluation."""

    task: Task
    model: Mapping[str, Any]
    """Name, file, hash, parameters, adapters."""
    settings: Mapping[str, Any]
    """What all contenders have alike: engine, seed, limits, template's system message."""
    made_with: Mapping[str, Any]
    methods: Sequence[MethodResult]
    comparisons: Sequence[Comparison]
    judged: Mapping[str, Sequence[Judged]]
    """By contender."""

    @property
    def repetitions(self) -> int:
        """The K of mean@K."""
        return max(method.repetitions for method in self.methods)


def as_json(document: Document) -> dict[str, Any]:
    """The object in results.json. Texts are in the answers' own files; here are their marks."""
    marks: dict[str, dict[str, list[dict[str, Any]]]] = {p.id: {} for p in document.task.problems}
    for name, judged in document.judged.items():
        for one in judged:
            row: dict[str, Any] = {"mark": one.verdict.mark}
            row |= {"answer": one.verdict.answer} if one.verdict.answer is not None else {}
            row |= {"detail": one.verdict.detail} if one.verdict.detail else {}
            marks[one.answer.problem.id].setdefault(name, []).append(row)
    return {
        "format": FORMAT,
        "task": {
            "name": document.task.name,
            "data": document.task.source,
            "problems": len(document.task.problems),
            "judge": document.task.judge,
        },
        "model": dict(document.model),
        "settings": dict(document.settings),
        "made_with": dict(document.made_with),
        "methods": [asdict(method) for method in document.methods],
        "comparisons": [asdict(comparison) for comparison in document.comparisons],
        "problems": [
            {"id": p.id, "answer": None if document.task.runs_code else p.answer, "marks": marks[p.id]}
            for p in document.task.problems
        ],
    }


def write_json(document: Document, path: Path) -> None:
    """Write results.json. Raises EmlocalError where it cannot be written."""
    with atomic_writer(path) as file:
        json.dump(as_json(document), file, ensure_ascii=False, indent=1)
        file.write("\n")
