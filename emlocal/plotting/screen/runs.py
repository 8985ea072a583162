"""Training runs on a terminal: a small line plot for each thing that they measured, two beside each other."""

from collections.abc import Sequence

from rich.text import Text

from emlocal.plotting.runs import Panel, RunMetrics, panels_of
from emlocal.plotting.screen.canvas import Canvas, letter
from emlocal.plotting.screen.frame import STYLES, axis_width, framed, short

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
