"""Training runs over their steps: entropy, reward, KL to the base, length, repetition."""

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
    """A figure of a line of metrics."""

    name: str
    title: str
    unit: str
    scale: float = 1.0

    @property
    def from_zero(self) -> bool:
        """Whether the axis begins at 0; rewards may be negative."""
        return self.name != "reward"


PANELS = (
    Panel("entropy", "Entropy of the answers", "nats a token"),
    *(Panel("reward", "Reward", unit) for unit in ("nats", "share", "weighted sum", "")),
    Panel("kl", "KL to the base", "nats a token"),
    Panel("length", "Length of the answers", "tokens"),
    Panel("repetition", "Repeated text", "%", 100),
)


@dataclass(frozen=True)
class RunMetrics:
    """What a run has written so far."""

    label: str
    rows: tuple[dict[str, Any], ...]
    reward: str = ""
    """The unit of its reward: runs of different ones have no axis in common."""

    def line(self, panel: Panel) -> tuple[list[int], list[float]]:
        """Steps and numbers, of the steps that have one."""
        if panel.name == "reward" and panel.unit != self.reward:
            return [], []
        found = [(row["step"], finite(row.get(panel.name))) for row in self.rows]
        known = [(step, panel.scale * n) for step, n in found if n is not None]
        return [step for step, _ in known], [n for _, n in known]


def panels_of(runs: Sequence[RunMetrics]) -> list[Panel]:
    """The panels that any of the runs has a number for.

    Raises UsageError where there is none.
    """
    found = [panel for panel in PANELS if any(run.line(panel)[0] for run in runs)]
    if not found:
        raise UsageError(f"the metrics of {runs[0].label} have no number to draw")
    return found


def read_runs(folders: Sequence[Path]) -> list[RunMetrics]:
    """The metrics of runs, labelled by as much of their paths as tells them apart.

    A torn last line, of a run that is being written, is left out.

    Raises UsageError for a folder that holds no run, or one that has no metrics yet.
    """
    pairs = zip(labels(folders, "a run"), folders, strict=True)
    return [RunMetrics(label, _rows(folder), _reward(folder)) for label, folder in pairs]


def _reward(folder: Path) -> str:
    """The unit of a run's reward, as far as its run.json tells."""
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
            f"{folder} holds no run: there is no {path.name}", "give what -o of finetune or rl was"
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
                f"{path} is no file of metrics, or damaged: line {number:,} is no JSON"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UsageError(f"{path} holds no metrics of a run", "give what -o of finetune or rl was")
        rows.append(row)
    if not rows:
        raise UsageError(f"the run in {folder} has no metrics yet", "wait for its first step")
    return tuple(rows)


_PANEL_WIDTH, _PANEL_HEIGHT = 4.2, 2.7  # of a panel, inches


def draw_runs(runs: Sequence[RunMetrics]) -> "Figure":
    """The figure of all runs.

    Raises UsageError where there is nothing to draw, BackendError where matplotlib is missing.
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
    """matplotlib leaves names that begin with an underscore out of its legends."""
    return f" {label}" if label.startswith("_") else label


_ROWS = 6
_TWO = 70  # columns: two panels have place beside each other
_GAP = 2


def show_runs(runs: Sequence[RunMetrics], width: int, *, colours: bool) -> list[Text]:
    """The lines to print. Several runs are told apart by colours, without them by letters."""
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
    return [*lines, Text("+ several at once")] if letters else lines


def _panel(
    panel: Panel, runs: Sequence[RunMetrics], steps: tuple[int, int], columns: int, letters: bool
) -> list[Text]:
    """A title, the plot, and its axes; `steps` are the first and the last of all runs."""
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
