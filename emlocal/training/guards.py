"""When a run has to stop by itself: it may collapse, and no labels are there to show it.

A model that only minimizes its entropy ends in answers that are certain and worthless: loops, one-word
answers, text without end. These show in the answers themselves, against those of the model as it was before
the first update: a collapse can be over within one or two of them.

Who is told how a run goes: people, and trackers of metrics (trackio, Weights & Biases, TensorBoard).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from emlocal.errors import BackendError, UsageError
from emlocal.loading import Warn, warn_in_python
from emlocal.training.rollouts import RolloutStats
from emlocal.training.settings import TrainingSettings

if TYPE_CHECKING:
    from emlocal.training.runner import TrainingResult

WINDOW = 3
"""Steps whose mean decides whether to stop: a single step's few answers vary."""


@dataclass
class Guards:
    """Looks at each step's answers; `history` is all that it remembers."""

    settings: TrainingSettings
    history: list[dict[str, float]] = field(default_factory=list)

    def look(self, stats: RolloutStats) -> str | None:
        """Why the run has to stop, in words, by a step's answers; None while it is well."""
        self.history.append(
            {"entropy": stats.entropy, "repetition": stats.repetition, "length": stats.length}
        )
        return self._beyond(_mean(self.history[-WINDOW:]))

    def look_at_kl(self, kl: float) -> str | None:
        """The same by the mean KL to the base of the answers looked at last, nats a token."""
        self.history[-1]["kl"] = kl
        return self._beyond(_mean(self.history[-WINDOW:]))

    @property
    def sound(self) -> bool:
        """Whether the answers looked at last are within the limits by themselves.

        The mean of a window lags behind a collapse: the adapter to keep is one from before it.
        """
        return self._beyond(self.history[-1]) is None

    def _beyond(self, now: Mapping[str, float]) -> str | None:
        """Which limit is passed, in words."""
        first, limits = self.history[0], self.settings
        if now["entropy"] < limits.entropy_floor:
            return (
                f"the answers' entropy is {now['entropy']:.3f} nats a token,"
                f" below --entropy-floor {limits.entropy_floor:g}"
            )
        if now["repetition"] > first["repetition"] + limits.max_repetition:
            return (
                f"{now['repetition']:.0%} of the answers' text is repeated,"
                f" {first['repetition']:.0%} at first (--max-repetition {limits.max_repetition:g})"
            )
        change = now["length"] / first["length"]
        if not 1 / limits.max_length_change <= change <= limits.max_length_change:
            return (
                f"the answers have {now['length']:.0f} tokens, {first['length']:.0f} at first"
                f" (--max-length-change {limits.max_length_change:g})"
            )
        if 0 < limits.max_kl < now.get("kl", 0.0):
            return f"the KL to the base is {now['kl']:.2f} nats a token, above --max-kl {limits.max_kl:g}"
        return None


def _mean(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the numbers that every step has: the last one's KL may not be known yet."""
    names = set.intersection(*(set(step) for step in steps))
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}


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
