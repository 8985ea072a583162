"""Checkpoints: all that the next steps depend on, whole or not there, and the one before if one is damaged.

    OUT/checkpoints/step-000010/
        state.json          step, what the guards have seen, SHA-256 of the files beside it
        learner.safetensors adapter and optimizer
        good.safetensors    the last adapter whose answers passed the guards

The order of prompts, the learning rate and every random number are functions of the seed and the step, so
they need no state of their own. Nothing is pickled.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emlocal.errors import EmlocalError, ModelError
from emlocal.files import atomic_folder
from emlocal.models.safetensors import read_safetensors_header

KEPT = 2
"""Checkpoints that stay: the newest and the one to fall back to."""
FORMAT = "emlocal-checkpoint-1"
_LEARNER, _GOOD, _STATE = "learner.safetensors", "good.safetensors", "state.json"

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` optimizer steps."""

    step: int
    learner: Arrays
    good: Arrays
    history: Any
    """What the guards have seen, as JSON."""


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint under `folder`, then remove all but the newest `KEPT`.

    Raises EmlocalError where it cannot be written; those before are untouched.
    """
    with atomic_folder(folder / _name(checkpoint.step), replace=True) as temporary:
        files = {_LEARNER: checkpoint.learner, _GOOD: checkpoint.good}
        for name, arrays in files.items():
            _write(temporary / name, arrays)
        state = {
            "format": FORMAT,
            "step": checkpoint.step,
            "history": checkpoint.history,
            "sha256": {name: _digest(temporary / name) for name in files},
        }
        (temporary / _STATE).write_text(json.dumps(state), encoding="utf-8")
    for old in _all(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with those that are newer."""
    damaged: list[str] = []
    for path in _all(folder):
        try:
            return _read(path), damaged
        except (OSError, ValueError, KeyError, TypeError, ModelError) as why:
            damaged.append(f"{path.name}: {why.message if isinstance(why, EmlocalError) else why}")
    return None, damaged


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _all(folder: Path) -> list[Path]:
    """The checkpoints under a folder, newest first."""
    found = (p for p in folder.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _write(path: Path, arrays: Arrays) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise ValueError(f"its format is {state['format']!r}, not {FORMAT}")
    for name, digest in state["sha256"].items():
        if _digest(path / name) != digest:
            raise ValueError(f"{name} is not what was written")
    return Checkpoint(int(state["step"]), _arrays(path / _LEARNER), _arrays(path / _GOOD), state["history"])


def _arrays(path: Path) -> Arrays:
    from safetensors.numpy import load_file

    read_safetensors_header(path)
    arrays: dict[str, NDArray[Any]] = load_file(path)
    return arrays


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
