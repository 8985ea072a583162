"""Where metrics go beside metrics.jsonl: trackio, Weights & Biases, TensorBoard."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from emlocal.errors import BackendError, UsageError

_MODULES = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboard.summary"}


def check_package(name: str) -> None:
    """Raise UsageError for an unknown tracker, BackendError where its package is missing."""
    if name not in _MODULES:
        raise UsageError(f"--report-to is {name!r}; it must be {' or '.join(_MODULES)}")
    if find_spec(name) is None:
        raise BackendError(f"--report-to {name} needs its package", f"pip install {name}")


class Reporter:
    """Sends each step's numbers to one of the trackers. Use it in a `with` block."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises UsageError for an unknown tracker, BackendError where its package is missing."""
        check_package(name)
        package: Any = import_module(_MODULES[name])
        if name == "tensorboard":
            writer = package.Writer(str(folder / "tensorboard"))
            self._log: Any = lambda step, row: [writer.add_scalar(key, v, step) for key, v in row.items()]
            self._finish: Any = writer.close
        else:
            package.init(project="emlocal", name=folder.name, config=dict(settings))
            self._log = lambda step, row: package.log(dict(row), step=step)
            self._finish = package.finish

    def log(self, row: Mapping[str, Any]) -> None:
        """A line of metrics: its numbers, at its step."""
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self._log(row["step"], numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
