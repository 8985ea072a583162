"""Checkpoints of a training run: everything that the next steps depend on.

    OUT/checkpoints/step-000010/
        state.json          step and history of the guards; SHA-256 of both and of the other files
        learner.safetensors adapter and optimizer
        good.safetensors    the last adapter whose answers passed the guards

A checkpoint is written whole or not at all. If the newest is damaged, the one before is used. The order of
prompts, the learning rate and every random number are functions of the seed and the step, so they need no
state of their own. Nothing is pickled.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from emlocal.errors import EmlocalError, ModelError
from emlocal.files import atomic_folder
from emlocal.models.safetensors import read_safetensors_header, write_safetensors
from emlocal.text import parse_json

KEPT = 2
"""Number of checkpoints that stay: the newest and one to fall back to."""
FORMAT = "emlocal-checkpoint-1"
_LEARNER, _GOOD, _STATE = "learner.safetensors", "good.safetensors", "state.json"

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` optimizer steps."""

    step: int
    learner: Arrays
    good: Arrays
    history: Any
    """History of the guards, as JSON."""


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint under `folder`, then removes all but it and the `KEPT` − 1 before it.

    Checkpoints of later steps are removed too: the run went back because they are damaged.

    Raises EmlocalError if it cannot be written; the other checkpoints are then unchanged.
    """
    with atomic_folder(folder / _name(checkpoint.step), replace=True) as temporary:
        files = {_LEARNER: checkpoint.learner, _GOOD: checkpoint.good}
        for name, arrays in files.items():
            write_safetensors(temporary / name, arrays)
        state = {"format": FORMAT, "step": checkpoint.step, "history": checkpoint.history}
        digests = {name: _digest(temporary / name) for name in files} | {_STATE: _digest_of(state)}
        (temporary / _STATE).write_text(json.dumps(state | {"sha256": digests}), encoding="utf-8")
    later = [path for path in _all(folder) if _step(path) > checkpoint.step]
    for old in [*later, *_all(folder)[len(later) + KEPT :]]:
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes files that a killed `save` left behind; each may be as large as a checkpoint."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest undamaged checkpoint, and a description of each newer, damaged one."""
    damaged: list[str] = []
    for path in _all(folder):
        try:
            return _read(path), damaged
        except (OSError, ValueError, KeyError, RecursionError, ModelError) as why:
            said = why.message if isinstance(why, EmlocalError) else why
            damaged.append(f"{path.name}: {said}".replace(f"{path}/", ""))
    return None, damaged


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _all(folder: Path) -> list[Path]:
    """Returns the checkpoints under a folder, newest first."""
    found = (p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal())
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read(path: Path) -> Checkpoint:
    state = parse_json((path / _STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError(f"{_STATE} is not a table")  # noqa: TRY004
    if state.get("format") != FORMAT:
        raise ValueError(f"its format is {state.get('format')!r}, not {FORMAT}")
    written = state.pop("sha256", None)
    found = {name: _digest(path / name) for name in (_LEARNER, _GOOD)} | {_STATE: _digest_of(state)}
    for name, digest in found.items():
        if not isinstance(written, dict) or written.get(name) != digest:
            raise ValueError(f"{name} is damaged")
    return Checkpoint(state["step"], _arrays(path / _LEARNER), _arrays(path / _GOOD), state["history"])


def _arrays(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    read_safetensors_header(path)
    arrays: dict[str, NDArray[Any]] = load_file(path)
    return arrays


def _digest_of(state: Mapping[str, Any]) -> str:
    """Returns the digest of a value as JSON. Python's numbers and tables read back exactly as written."""
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
