"""The content of an evaluation's report, written to results.json and read from it.

Also the provenance of a result: versions, commit, machine.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import emlocal
from emlocal.backends import ENGINES
from emlocal.backends.engine import engine
from emlocal.errors import EmlocalError, UsageError
from emlocal.evaluation.answering import Judged
from emlocal.evaluation.confidence import CONFIDENCE, ScoreResult
from emlocal.evaluation.confidence import as_json as score_json
from emlocal.evaluation.results import Comparison, Estimate, MethodResult
from emlocal.evaluation.selective import COVERAGES
from emlocal.evaluation.tasks.task import Task
from emlocal.files import atomic_writer
from emlocal.machine import cpu
from emlocal.text import harmless, parse_json

FORMAT = "emlocal-eval-1"


@dataclass(frozen=True)
class Document:
    """The content of an evaluation's report."""

    task: Task
    model: Mapping[str, Any]
    """Name, file, hash, parameters, adapters."""
    settings: Mapping[str, Any]
    """Settings that all contenders share: engine, seed, limits, system message."""
    made_with: Mapping[str, Any]
    methods: Sequence[MethodResult]
    comparisons: Sequence[Comparison]
    judged: Mapping[str, Sequence[Judged]]
    """Judged answers by contender."""
    confidence: Mapping[str, Sequence[ScoreResult]] = field(default_factory=dict)
    """By contender, the figures of its scores; empty if its answers have no scores."""

    @property
    def repetitions(self) -> int:
        """The K of mean@K."""
        return max(method.repetitions for method in self.methods)


def as_json(document: Document) -> dict[str, Any]:
    """Returns the object for results.json. It has the verdicts; the texts are in the answers' own files."""
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
        "methods": [
            asdict(method) | {"scores": [score_json(one) for one in document.confidence.get(method.name, ())]}
            for method in document.methods
        ],
        "comparisons": [asdict(comparison) for comparison in document.comparisons],
        "problems": [
            {"id": p.id, "answer": None if document.task.runs_code else p.answer, "marks": marks[p.id]}
            for p in document.task.problems
        ],
    }


def write_json(document: Document, path: Path) -> None:
    """Writes results.json. Raises EmlocalError if it cannot be written."""
    with atomic_writer(path) as file:
        json.dump(as_json(document), file, ensure_ascii=False, indent=1)
        file.write("\n")


_LARGEST = 1e300  # NaN, infinities and endless integers fail `abs(x) <= _LARGEST`


@dataclass(frozen=True)
class Standing:
    """A method's accuracy and the cost of its answers."""

    name: str
    accuracy: Estimate
    flops: float
    """FLOPs of one answer; 0 if there is none."""
    repetitions: int = 1
    """The K of mean@K."""
    risks: tuple[Estimate, ...] = ()
    """Share of wrong answers among the most confident, by `selective.COVERAGES`; empty without confidence."""

    @classmethod
    def of(cls, method: MethodResult, scores: Sequence[ScoreResult] = ()) -> "Standing":
        """Makes a standing from the results of an evaluation."""
        sure = next((one.risks for one in scores if one.score == CONFIDENCE), ())
        return cls(method.name, method.accuracy, method.cost.flops, method.repetitions, sure)


@dataclass(frozen=True)
class Results:
    """The part of results.json that plots need."""

    task: str
    problems: int
    model: str
    standings: tuple[Standing, ...]


def read_results(path: Path) -> Results:
    """Reads the methods' results from results.json.

    Raises UsageError if the file is missing, is not a results.json, has another version or is damaged. Raises
    EmlocalError if it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes().decode())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} does not exist", "name the folder that eval wrote (-o)") from None
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why
    except UnicodeDecodeError as why:
        raise UsageError(f"{path} has no results of eval: byte {why.start:,} is not UTF-8 text") from None
    except json.JSONDecodeError as why:
        raise UsageError(f"{path} is not JSON, or is damaged, at line {why.lineno:,}: {why.msg}") from None
    except (ValueError, RecursionError) as why:
        raise UsageError(f"{path} has no results of eval: {why}") from None
    _check_format(found, path)
    try:
        return _results(found)
    except _DamagedError as why:
        raise UsageError(f"{path} is damaged: {why}", "run the same emlocal eval again") from None


def _check_format(found: object, path: Path) -> None:
    name = found.get("format") if isinstance(found, dict) else None
    if name == FORMAT:
        return
    if isinstance(name, str) and name.startswith(FORMAT.rstrip("0123456789")):
        raise UsageError(
            f"{path} comes from another version of emlocal: its format is {name}, this one reads {FORMAT}",
            "run the same emlocal eval again; existing answers are kept",
        )
    raise UsageError(f"{path} has no results of eval", "name the folder that eval wrote (-o)")


class _DamagedError(ValueError):
    """A value that is missing or has the wrong type; the text names it."""


def _results(found: dict[str, Any]) -> Results:
    task, model = _part(found, "task"), _part(found, "model")
    methods = found.get("methods")
    if not isinstance(methods, list) or not methods:
        raise _DamagedError("it has no methods")
    return Results(
        _text(task, "name"),
        int(_number(task, "problems")),
        _text(model, "name"),
        tuple(_standing(method) for method in methods),
    )


def _standing(method: object) -> Standing:
    if not isinstance(method, dict):
        raise _DamagedError("a method is not an object")
    return Standing(
        _text(method, "name"),
        _share(_part(method, "accuracy"), "an accuracy"),
        max(0.0, _number(_part(method, "cost"), "flops")),
        int(_number(method, "repetitions")),
        _risks(method),
    )


def _risks(method: dict[str, Any]) -> tuple[Estimate, ...]:
    """Returns the risks of the confidence; empty if an earlier version wrote none."""
    scores = method.get("scores", [])
    if not isinstance(scores, list):
        raise _DamagedError("scores are not a list")
    for score in scores:
        if isinstance(score, dict) and score.get("score") == CONFIDENCE:
            risks = score.get("risks")
            if not isinstance(risks, list) or len(risks) != len(COVERAGES):
                raise _DamagedError("risks are missing")
            return tuple(_share(risk, "a risk") for risk in risks)
    return ()


def _share(found: object, what: str) -> Estimate:
    if not isinstance(found, dict):
        raise _DamagedError(f"{what} is not an object")
    value, low, high = (_number(found, name) for name in ("value", "low", "high"))
    if not (0 <= low <= high <= 1 and 0 <= value <= 1):
        raise _DamagedError(f"{what} is {value}, of {low} to {high}")
    return Estimate(value, low, high)


def _part(of: dict[str, Any], name: str) -> dict[str, Any]:
    value = of.get(name)
    if not isinstance(value, dict):
        raise _DamagedError(f"{name} is missing, or not an object")
    return value


def _text(of: dict[str, Any], name: str) -> str:
    value = of.get(name)
    if not isinstance(value, str):
        raise _DamagedError(f"{name} is missing, or not a text")
    return harmless(value)


def _number(of: dict[str, Any], name: str) -> float:
    value = of.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise _DamagedError(f"{name} is missing, or not a number")
    return value


_ANSWERED = "made_with.jsonl"


def provenance(name: str) -> dict[str, object]:
    """Returns versions, commit and machine for results.json. `name`: the engine."""
    machine = cpu()
    packages = ("numpy", *(engine(name).distributions if name in ENGINES else ()), "math-verify")
    return {
        "emlocal": emlocal.__version__,
        "commit": commit(),
        "packages": {name: found for name in packages if (found := _version(name))},
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": machine.model,
        "cores": machine.physical,
    }


def note_answering(folder: Path, method: str, made_with: Mapping[str, object]) -> None:
    """Records in the evaluation's folder what a method's answers are made with from now on."""
    if answered_with(folder).get(method, [])[-1:] != [dict(made_with)]:
        with (folder / _ANSWERED).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"method": method, "made_with": made_with}, ensure_ascii=False) + "\n")


def answered_with(folder: Path) -> dict[str, list[dict[str, object]]]:
    """Returns what each method's answers were made with, oldest first.

    There are several entries if a run was resumed with another version or on another machine.
    """
    found: dict[str, list[dict[str, object]]] = {}
    path = folder / _ANSWERED
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            value = parse_json(line)
            found.setdefault(value["method"], []).append(dict(value["made_with"]))
        except (ValueError, KeyError, TypeError):
            continue  # torn by a crash
    return found


def answered_otherwise(
    folder: Path, methods: Sequence[str], now: Mapping[str, object]
) -> dict[str, list[str]]:
    """Returns, by method, the versions, commit or machine that differ from those of this run."""
    before = answered_with(folder)
    found = {}
    for method in methods:
        others = [made for made in before.get(method, []) if made != now]
        if others:
            found[method] = [
                ", ".join(f"{name} {value}" for name, value in made.items() if value != now.get(name))
                for made in others
            ]
    return found


def check_folder(output: Path | None) -> None:
    """Raises UsageError if the output folder cannot be created or written. Runs before a model is loaded."""
    if output is None:
        return
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{there} is a file; -o must name a folder", "use another -o")
    if not os.access(there, os.W_OK):
        raise UsageError(f"{there} is not writable", "use another -o")


def commit() -> str | None:
    """Returns the commit of emlocal's checkout, with "-dirty" if it has changes.

    Returns None if it is not a checkout.
    """
    folder = Path(emlocal.__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        inside = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return (head + ("-dirty" if changed else "")) if inside else None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
