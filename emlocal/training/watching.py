"""Who is told how a run goes: people, and trackers of metrics (trackio, Weights & Biases, TensorBoard)."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from emlocal.errors import BackendError, UsageError
from emlocal.loading import Warn, warn_in_python

if TYPE_CHECKING:
    from emlocal.training.runner import TrainingResult

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


class View:
    """Is told how a run goes. This one says warnings alone; the command line's draws bars and a table."""

    def __init__(self, warn: Warn = warn_in_python) -> None:
        self._warn = warn
        self.reporter: Reporter | None = None

    def loading(self, what: str, done: int, total: int | None) -> None:
        """What comes before the run: a download, the model, the prompts. A `Progress`."""

    def begin(self, lines: Sequence[str], resumed: int | None) -> None:
        """What is about to happen, in lines; `resumed`: the step that the run goes on after."""

    def answering(self, step: int, done: int, total: int) -> None:
        """Answers of this step drawn."""

    def training(self, step: int, done: int, total: int) -> None:
        """Answers of this step computed with."""

    def validating(self, done: int, total: int) -> None:
        """Prompts with known answers answered."""

    def finished_step(self, row: dict[str, Any]) -> None:
        """A line of metrics."""
        if self.reporter is not None:
            self.reporter.log(row)

    def warn(self, text: str) -> None:
        """Something that people should know."""
        self._warn(text)

    def validated(self, before: float, after: float) -> None:
        """Accuracies before and after the run."""

    def stopped(self, output: Path) -> None:
        """It was asked to."""

    def ended(self, result: "TrainingResult") -> None:
        """It ended by itself."""
