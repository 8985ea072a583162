"""Plots of training runs over their steps: entropy, reward, KL to the base, length, repetition."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from emlocal.errors import EmlocalError, UsageError
from emlocal.plotting import (
    STYLES,
    Canvas,
    axis_width,
    finite,
    framed,
    labels,
    legend_above,
    letter,
    new_figure,
    plain_axes,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """A plot of one number from the metrics."""

    name: str
    title: str
    unit: str
    scale: float = 1.0

    @property
    def from_zero(self) -> bool:
        """Whether the axis begins at 0; rewards may be negative."""
        return self.name != "reward"


PANELS = (
    Panel("entropy", "Entropy of answers", "nats per token"),
    *(Panel("reward", "Reward", unit) for unit in ("nats", "share", "weighted sum", "")),
    Panel("kl", "KL to the base model", "nats per token"),
    Panel("length", "Length of answers", "tokens"),
    Panel("repetition", "Repeated text", "%", 100),
)


@dataclass(frozen=True)
class RunMetrics:
    """The metrics of a run so far."""

    label: str
    rows: tuple[dict[str, Any], ...]
    reward: str = ""
    """Unit of the reward; runs with different units have no axis in common."""

    def line(self, panel: Panel) -> tuple[list[int], list[float]]:
        """Returns the steps that have a number for this panel, and the numbers."""
        if panel.name == "reward" and panel.unit != self.reward:
            return [], []
        found = [(row["step"], finite(row.get(panel.name))) for row in self.rows]
        known = [(step, panel.scale * n) for step, n in found if n is not None]
        return [step for step, _ in known], [n for _, n in known]


def panels_of(runs: Sequence[RunMetrics]) -> list[Panel]:
    """Returns the panels for which any run has a number.

    Raises UsageError if there are none.
    """
    found = [panel for panel in PANELS if any(run.line(panel)[0] for run in runs)]
    if not found:
        raise UsageError(f"the metrics of {runs[0].label} have no number to plot")
    return found


def read_runs(folders: Sequence[Path]) -> list[RunMetrics]:
    """Reads the metrics of runs and labels them by as many path parts as make them differ.

    If a run is still being written, a torn last line is left out.

    Raises UsageError for a folder without a run or without metrics.
    """
    pairs = zip(labels(folders, "a run"), folders, strict=True)
    return [RunMetrics(label, _rows(folder), _reward(folder)) for label, folder in pairs]


def _reward(folder: Path) -> str:
    """Returns the unit of a run's reward from its run.json; empty if unknown."""
    try:
        ((name, _), *more) = json.loads((folder / "run.json").read_text("utf-8"))["settings"]["reward"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    if more:
        return "weighted sum"
    return "nats" if name in ("token", "sequence", "self-certainty") else "share"


def _rows(folder: Path) -> tuple[dict[str, Any], ...]:
    path = folder / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder} is not a run: it has no {path.name}", "name the folder that finetune or rl wrote (-o)"
        ) from None
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why
    rows: list[dict[str, Any]] = []
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) and line.startswith("{"):
                break
            raise UsageError(
                f"{path} is not a metrics file, or is damaged: line {number:,} is not JSON"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UsageError(
                f"{path} has no metrics of a run", "name the folder that finetune or rl wrote (-o)"
            )
        rows.append(row)
    if not rows:
        raise UsageError(f"the run in {folder} has no metrics yet", "wait until its first step is done")
    return tuple(rows)


_PANEL_WIDTH, _PANEL_HEIGHT = 4.2, 2.7  # size of a panel in inches


def draw_runs(runs: Sequence[RunMetrics]) -> "Figure":
    """Draws a figure of all runs.

    Raises UsageError if there is nothing to draw, and BackendError if matplotlib is missing.
    """
    panels = panels_of(runs)
    columns = min(len(panels), 3 if len(panels) > 4 else 2)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(_PANEL_WIDTH * columns, _PANEL_HEIGHT * rows + 0.4)
    from matplotlib.ticker import MaxNLocator

    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        for k, run in enumerate(runs):
            steps, numbers = run.line(panel)
            if steps:
                axes.plot(steps, numbers, marker=".", label=_shown(run.label), color=f"C{k}")
        plain_axes(axes, panel.title)
        axes.set_ylabel(panel.unit)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.from_zero:
            axes.set_ylim(bottom=0)
    legend_above(figure)
    return figure


def _shown(label: str) -> str:
    """Returns a label that matplotlib shows: its legends leave out names that begin with an underscore."""
    return f" {label}" if label.startswith("_") else label


_ROWS = 6
_TWO = 70  # columns from which on two panels fit side by side
_GAP = 2


def show_runs(runs: Sequence[RunMetrics], width: int, *, colours: bool) -> list[Text]:
    """Returns the lines to print. Several runs differ in colour or, without colours, in letter."""
    panels = panels_of(runs)
    letters = len(runs) > 1 and not colours
    beside = 2 if width >= _TWO and len(panels) > 1 else 1
    columns = (width - _GAP * (beside - 1)) // beside
    steps = [row["step"] for run in runs for row in run.rows]
    blocks = [_panel(panel, runs, (min(steps), max(steps)), columns, letters) for panel in panels]
    lines = _legend(runs, letters)
    for start in range(0, len(blocks), beside):
        lines.append(Text())
        for row in zip(*blocks[start : start + beside], strict=True):
            line = Text()
            for cell in row:
                line.append(" " * (_GAP if line else 0))
                cell.pad_right(max(0, columns - cell.cell_len))
                line.append_text(cell)
            line.rstrip()
            lines.append(line)
    return lines


def _legend(runs: Sequence[RunMetrics], letters: bool) -> list[Text]:
    if len(runs) == 1:
        return [Text(runs[0].label, "bold")]
    lines = [
        Text(letter(i) if letters else "━━", STYLES[i % len(STYLES)]).append(f" {run.label}", "default")
        for i, run in enumerate(runs)
    ]
    return [*lines, Text("+ several in one column")] if letters else lines


def _panel(
    panel: Panel, runs: Sequence[RunMetrics], steps: tuple[int, int], columns: int, letters: bool
) -> list[Text]:
    """Returns a title, a plot and its axes; `steps` are the first and the last step of all runs."""
    found = [run.line(panel) for run in runs]
    numbers = [n for _, line in found for n in line]
    low = min(0.0, *numbers) if panel.from_zero else min(numbers)
    high = max(numbers)
    if high == low:
        low, high = (low, low + 1) if panel.from_zero else (low - 1, high + 1)
    first, last = steps
    canvas = Canvas(columns - axis_width(low, high), _ROWS, letters=letters)
    for i, (xs, ys) in enumerate(found):
        if xs:
            points = [
                ((x - first) / max(1, last - first), (y - low) / (high - low))
                for x, y in zip(xs, ys, strict=True)
            ]
            canvas.line(points, i)
    title = f"{panel.title}, {panel.unit}" if panel.unit else panel.title
    middle = f"step (last: {short(found[0][1][-1])})" if len(runs) == 1 else "step"
    body = framed(canvas.rows(), low, high, f"{first:,}", middle, f"{last:,}" if last > first else "")
    return [Text(title, "bold"), *body]
