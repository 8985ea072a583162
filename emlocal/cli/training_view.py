"""Training on the command line: a line for each step, a bar, and the report of a dry run."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import typer

from emlocal import console
from emlocal.files import Progress
from emlocal.settings import settings_of
from emlocal.text import CONTROLS, counted, duration, human_size, plain
from emlocal.training.engines import Objective
from emlocal.training.folder import View
from emlocal.training.runner import TrainingResult, Trial, train, try_out
from emlocal.training.settings import Setup, TrainingSettings

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Row = Mapping[str, Any]
Column = tuple[str, int, Callable[[Row], str]]
"""Heading, width in characters, and the function that fills the cell."""


def number(name: str, digits: int) -> Callable[[Row], str]:
    """Returns a function that formats a number of the metrics; empty if the metrics lack it."""
    return lambda row: "" if row.get(name) is None else f"{row[name]:.{digits}f}"


def share(name: str, digits: int) -> Callable[[Row], str]:
    """Returns a function that formats a share of the metrics in percent; empty if the metrics lack it."""
    return lambda row: "" if row.get(name) is None else f"{row[name]:.{digits}%}"


ENTROPY: Column = ("entropy", 8, number("entropy", 4))
KL: Column = ("KL", 7, number("kl", 4))
LENGTH: Column = ("tokens", 7, number("length", 1))
ENDED: Column = ("ended", 6, share("ended", 0))
REPETITION: Column = ("repeats", 8, share("repetition", 1))
GRADIENT: Column = ("gradient", 9, number("gradient_norm", 3))
SECONDS: Column = ("seconds", 8, lambda row: f"{row['rollout_seconds'] + row.get('train_seconds', 0.0):.1f}")


FINETUNE_COLUMNS = (ENTROPY, KL, LENGTH, ENDED, REPETITION, GRADIENT, SECONDS)
RL_COLUMNS = (
    ("reward", 9, number("reward", 3)),
    ("same", 5, share("zero_variance", 0)),
    *(ENTROPY, KL, LENGTH, REPETITION, GRADIENT, SECONDS),
)


def carry_out(objective: Objective[Any], setup: Setup, columns: Sequence[Column]) -> None:
    """Trains or, with `--dry-run`, reports what a run would do.

    Raises the errors of its parts, and Exit(1) for a run that stopped by itself.
    """
    with TerminalView(objective.settings.steps, columns, setup.run.quiet) as view:
        if setup.run.dry_run:
            trial = try_out(objective, setup, view)
            view.stop()
            if trial is not None:
                show_trial(trial)
            return
        result = train(objective, setup, view)
    if result.outcome.reason != "finished":
        raise typer.Exit(1)


class TerminalView(View):
    """Reports a run on stderr. Use it in a `with` block."""

    def __init__(self, steps: int, columns: Sequence[Column], quiet: bool) -> None:
        super().__init__(console.warn)
        step: Column = ("step", 9, lambda row: f"{row['step']:>4}/{steps:<4}")
        self._columns = (step, *columns)
        self._quiet = quiet
        self._opened = ExitStack()
        self._progress: Progress | None = None
        self._bars: Bars | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Removes the bar."""
        self._opened.close()
        self._bars = self._progress = None

    def loading(self, what: str, done: int, total: int | None) -> None:
        if self._progress is None:
            self._progress = self._opened.enter_context(console.progress(self._quiet))
        self._progress(what, done, total)

    def begin(self, lines: Sequence[str], resumed: int | None) -> None:
        """Describes the run before it begins; the lines fit 80 columns, apart from long names."""
        self.stop()
        if self._quiet:
            return
        for line in lines:
            console.note(line)
        if resumed is not None:
            console.note(f"resuming after step {resumed}")
        console.note(" ".join(f"{title:>{width}}" for title, width, _ in self._columns))
        if console.err().is_terminal:
            self._show_bars()

    def _show_bars(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        bars = Bars(*columns, TimeElapsedColumn(), console=console.err(), transient=True)
        self._bars, self._task = self._opened.enter_context(bars), None

    def answering(self, step: int, done: int, total: int) -> None:
        self._bar(f"step {step}: answering", done, total)

    def training(self, step: int, done: int, total: int) -> None:
        self._bar(f"step {step}: training", done, total)

    def validating(self, done: int, total: int) -> None:
        """Shows how many prompts of `--validate` are answered."""
        self._bar("validating", done, total)

    def _bar(self, text: str, done: int, total: int) -> None:
        if self._bars is not None:
            if self._task is None:
                self._task = self._bars.add_task(text, total=total)
            self._bars.update(self._task, description=text, completed=done, total=total)

    def finished_step(self, row: dict[str, Any]) -> None:
        """Prints a line of the table."""
        super().finished_step(row)
        if self._quiet:
            return
        console.note(" ".join(f"{said(row):>{width}}" for _, width, said in self._columns))

    def validated(self, before: float, after: float) -> None:
        """Prints the accuracies of `--validate`."""
        if not self._quiet:
            console.note(f"accuracy on the validation prompts: {before:.1%} → {after:.1%}")

    def said(self, text: str) -> None:
        """Prints the result of a part of the run."""
        self.stop()
        if not self._quiet:
            console.note(text)

    def stopped(self, output: Path) -> None:
        """Says that the run stopped on request, and how to resume it."""
        self.stop()
        if not self._quiet:
            console.note(f"stopped ({output}); resume with the same command and --resume")

    def ended(self, result: TrainingResult) -> None:
        """Prints how the run ended and what to do next."""
        self.stop()
        outcome, output = result.outcome, result.adapter
        if self._quiet:
            if outcome.reason != "finished":
                console.warn(f"stopped: {outcome.message}")
            return
        console.note(f"{'finished' if outcome.reason == 'finished' else 'stopped'}: {outcome.message}")
        first, last = outcome.first, outcome.last
        if first and last:
            console.note(
                f"entropy {first.entropy:.3f} → {last.entropy:.3f} nats per token,"
                f" length {first.length:.0f} → {last.length:.0f},"
                f" repetition {first.repetition:.1%} → {last.repetition:.1%}"
            )
        if outcome.steps == 0:
            console.note(f"no step could be kept; the adapter in {output} changes nothing")
            return
        console.note(f"the adapter after {counted(outcome.steps, 'step')} is in {output}; try it:")
        console.command(["emlocal", "chat", "-m", result.model, "--adapter", str(output)])


def show_trial(trial: Trial) -> None:
    """Prints the settings, one example as it would be trained on, and the time and memory of a run."""
    settings = trial.settings
    console.heading("Settings")
    for name, value in vars(settings).items():
        _line(_flag(settings, name), _said(value))
    _line("--context", f"{trial.context:,}")
    _line("--tokens-per-batch", f"{trial.token_budget:,}")
    _line("prompts", f"{trial.fitting:,} of {trial.prompts:,}")
    for name, text in zip(("model", "adapter", "engine"), trial.described, strict=True):
        _line(name, text)

    console.heading("One example")  # the prompt is not in the loss, the answer is
    (prompt, asked), (answer, answered) = trial.example
    console.write(f"  not in the loss ({counted(asked, 'token')}; <n> is control token n):\n")
    console.write(_indented(prompt))
    console.write(f"  in the loss ({counted(answered, 'token')} of an answer, shortened here):\n")
    console.write(_indented(answer))

    console.heading("A run, if every answer has --max-tokens")
    most = f"answers of {settings.max_tokens:,} tokens"
    _line("answering", f"{trial.answering_speed:,.0f} tokens/s")
    _line("training", f"{trial.training_speed:,.0f} tokens/s, prompts included")
    if trial.votes:
        _line(
            "the votes", f"{duration(trial.voting_seconds)} ({trial.votes:,} {most}, before the first step)"
        )
        share = trial.voting_seconds / trial.run_seconds
        _line("", f"{share:.0%} of the run{'; --limit or --samples shorten it' if share > 0.5 else ''}")
    _line("a step", f"{duration(trial.step_seconds)} ({settings.answers_per_step:,} {most})")
    steps = counted(settings.steps, "step")
    _line(f"votes and {steps}" if trial.votes else steps, duration(trial.run_seconds))
    _line("memory", f"{human_size(trial.peak_memory)} at its peak, with one whole micro-batch")


def _flag(settings: TrainingSettings, name: str) -> str:
    """Returns the flag of a setting."""
    numbers = settings_of(type(settings))
    return numbers[name].flag if name in numbers else "--" + name.replace("_", "-")


def _line(name: str, text: str) -> None:
    console.write(f"  {name:<21} {text}\n")


def _said(value: Any) -> str:
    if isinstance(value, float):
        return plain(value)
    if not isinstance(value, tuple):
        return str(value)
    return ",".join(each if isinstance(each, str) else f"{each[0]}={plain(each[1])}" for each in value)


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.translate(CONTROLS).splitlines())
