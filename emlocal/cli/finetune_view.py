"""What people see of a fine-tuning run: a line a step, and a bar for the step that is under way."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from emlocal import console
from emlocal.training.settings import FineTuneSettings
from emlocal.words import counted, plain

if TYPE_CHECKING:
    from rich.progress import Progress

    from emlocal.training.reporting import Reporter

_HEAD = (
    f"{'step':>9} {'entropy':>8} {'KL':>7} {'tokens':>7} {'ended':>6} {'repeats':>8}"
    f" {'gradient':>9} {'seconds':>8}"
)


class View:
    """Tells how a run goes, on stderr. Use it in a `with` block."""

    def __init__(self, settings: FineTuneSettings, quiet: bool) -> None:
        self.reporter: Reporter | None = None
        self._settings = settings
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

    def begin(self, engines: Sequence[str], prompts: int, recipe: str, resumed: int | None) -> None:
        """What is about to happen."""
        if self._quiet:
            return
        s = self._settings
        lines = [
            *engines,
            f"recipe {recipe}: {counted(s.steps, 'step')} of {counted(s.prompts_per_step, 'answer')}"
            f" to {counted(prompts, 'prompt')},",
            f"learning rate {plain(s.learning_rate)}, β {plain(s.kl_beta)}, rank {s.rank}, seed {s.seed}",
        ]
        for line in lines:  # each short enough for 80 columns, a long name aside
            console.note(line)
        if resumed is not None:
            console.note(f"going on after step {resumed}")
        console.note(_HEAD)

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
        norm, kl = row.get("gradient_norm"), row.get("kl")
        seconds = row["rollout_seconds"] + row.get("train_seconds", 0.0)
        console.note(
            f"{row['step']:>4}/{self._settings.steps:<4} {row['entropy']:>8.4f}"
            f" {'' if kl is None else f'{kl:.4f}':>7} {row['length']:>7.1f} {row['ended']:>6.0%}"
            f" {row['repetition']:>8.1%} {'' if norm is None else f'{norm:.3f}':>9} {seconds:>8.1f}"
        )

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
