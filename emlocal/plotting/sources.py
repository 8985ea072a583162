"""What a path on the command line is: a training run, an evaluation or a trace."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from emlocal.errors import UsageError

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
