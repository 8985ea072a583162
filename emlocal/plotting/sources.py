"""What a path is, a training run, an evaluation or a trace, and how it is read and labelled."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from emlocal.errors import EmlocalError, UsageError
from emlocal.text import harmless

Kind = Literal["run", "evaluation", "trace"]

METRICS, RESULTS = "metrics.jsonl", "results.json"
_ARTICLES = {"run": "a training run", "evaluation": "an evaluation", "trace": "a trace"}
_HINT = "give what -o of finetune, rl or eval was, or what --trace of generate wrote"


def kind_of(paths: Sequence[Path]) -> Kind:
    """What the paths are, all of them.

    Raises UsageError for one that is not there or is nothing of the kind, and for different kinds together:
    they have no axis in common.
    """
    kinds = [_kind(path) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if kind != kinds[0]:
            raise UsageError(
                f"{paths[0]} is {_ARTICLES[kinds[0]]} and {path} is {_ARTICLES[kind]}:"
                " they cannot be drawn together",
                "draw each kind by a command of its own",
            )
    return kinds[0]


def folder_of(path: Path) -> Path:
    """A run's folder, of the folder itself or its file of metrics."""
    return path if path.is_dir() else path.parent


def results_of(path: Path) -> Path:
    """An evaluation's results.json, of its folder or the file itself."""
    return path / RESULTS if path.is_dir() else path


def _kind(path: Path) -> Kind:
    """By the name: what is inside is for the kind's own reader to judge."""
    if not path.exists():
        raise UsageError(f"{path} is not there", _HINT)
    if not path.is_dir():
        return "run" if path.name == METRICS else "evaluation" if path.suffix == ".json" else "trace"
    if (path / METRICS).exists():
        return "run"
    if (path / RESULTS).exists():
        return "evaluation"
    if (path / "answers").is_dir():
        raise UsageError(
            f"the evaluation in {path} has not come to its end: there is no {RESULTS}",
            "run its command again: it goes on where it stopped",
        )
    raise UsageError(f"{path} holds no run ({METRICS}) and no evaluation ({RESULTS})", _HINT)


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises UsageError where there is no such file, EmlocalError where it cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is not there") from None
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why


def finite(value: object) -> float | None:
    """The number that a JSON value is; None where it is none, or none that has a place on an axis."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def labels(paths: Sequence[Path], what: str) -> list[str]:
    """The last parts of the paths, as many as make them different. `what` they are, for the error.

    Raises UsageError for a path that is given twice.
    """
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise UsageError(f"{what} is given twice", "give each once")
    # links go by their own names, as they were given
    named = [path.resolve() if ".." in path.parts else path.absolute() for path in paths]
    found = [path.name for path in named]
    for parts in range(2, max(len(path.parts) for path in named) + 1):
        if len(set(found)) == len(found):
            break
        found = ["/".join(path.parts[-parts:]) for path in named]
    return [harmless(label) for label in found]
