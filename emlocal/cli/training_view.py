"""What people see of a training run: a line a step, and a bar for the step that is under way."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from emlocal import console

if TYPE_CHECKING:
    from rich.progress import Progress

    from emlocal.training.reporting import Reporter

Row = Mapping[str, Any]
Column = tuple[str, int, Callable[[Row], str]]
"""Heading, width, and what stands there."""


def number(name: str, digits: int) -> Callable[[Row], str]:
    """A number of a line of metrics; nothing where it has none."""
    return lambda row: "" if row.get(name) is None else f"{row[name]:.{digits}f}"


def share(name: str, digits: int) -> Callable[[Row], str]:
    """The same in percent."""
    return lambda row: "" if row.get(name) is None else f"{row[name]:.{digits}%}"


ENTROPY: Column = ("entropy", 8, number("entropy", 4))
KL: Column = ("KL", 7, number("kl", 4))
LENGTH: Column = ("tokens", 7, number("length", 1))
ENDED: Column = ("ended", 6, share("ended", 0))
REPETITION: Column = ("repeats", 8, share("repetition", 1))
GRADIENT: Column = ("gradient", 9, number("gradient_norm", 3))
SECONDS: Column = ("seconds", 8, lambda row: f"{row['rollout_seconds'] + row.get('train_seconds', 0.0):.1f}")


class View:
    """Tells how a run goes, on stderr. Use it in a `with` block."""

    def __init__(self, steps: int, columns: Sequence[Column], quiet: bool) -> None:
        self.reporter: Reporter | None = None
        step: Column = ("step", 9, lambda row: f"{row['step']:>4}/{steps:<4}")
        self._columns = (step, *columns)
        self._quiet = quiet
        self._opened = ExitStack()
        self._bars: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if not self._quiet and console.err().is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console.err(),
                transient=True,
            )
            self._bars = self._opened.enter_context(bars)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        self._opened.close()
        self._bars = None

    def begin(self, lines: Sequence[str], resumed: int | None) -> None:
        """What is about to happen; lines short enough for 80 columns, a long name aside."""
        if self._quiet:
            return
        for line in lines:
            console.note(line)
        if resumed is not None:
            console.note(f"going on after step {resumed}")
        console.note(" ".join(f"{title:>{width}}" for title, width, _ in self._columns))

    def answering(self, step: int, done: int, total: int) -> None:
        self._bar(f"step {step}: answering", done, total)

    def training(self, step: int, done: int, total: int) -> None:
        self._bar(f"step {step}: training", done, total)

    def validating(self, done: int, total: int) -> None:
        """Prompts of `--validate` answered."""
        self._bar("validating", done, total)

    def _bar(self, text: str, done: int, total: int) -> None:
        if self._bars is not None:
            if self._task is None:
                self._task = self._bars.add_task(text, total=total)
            self._bars.update(self._task, description=text, completed=done, total=total)

    def finished_step(self, row: dict[str, Any]) -> None:
        """A line of the table."""
        if self.reporter is not None:
            self.reporter.log(row)
        if self._quiet:
            return
        console.note(" ".join(f"{said(row):>{width}}" for _, width, said in self._columns))

    def warn(self, text: str) -> None:
        """Something that people should know, `--quiet` or not."""
        console.warn(text)

    def validated(self, before: float, after: float) -> None:
        """Accuracies of `--validate`."""
        if not self._quiet:
            console.note(f"accuracy on the validation prompts: {before:.1%} → {after:.1%}")

    def stopped(self, output: Path) -> None:
        """It was asked to."""
        self.stop()
        if not self._quiet:
            console.note(f"stopped; the same command with --resume goes on ({output})")
