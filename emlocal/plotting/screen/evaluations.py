"""Evaluations on a terminal: a bar with its interval for each method, and bars of what an answer costs."""

import math
from collections.abc import Sequence

from rich.text import Text

from emlocal.evaluation.report.reading import Standing
from emlocal.evaluation.report.texts import flops, share
from emlocal.evaluation.results import Estimate
from emlocal.plotting.evaluations import Evaluation, accuracy_name
from emlocal.plotting.screen.frame import bar, between

_SCALES = (5, 10, 20, 25, 50, 75, 100)  # percent, at the axis' end
_NUMBERS = 19  # columns of "100.0 (99.9–100.0)"


def show_evaluations(evaluations: Sequence[Evaluation], width: int) -> list[Text]:
    """The lines to print; the axes are the same for all evaluations."""
    standings = [standing for each in evaluations for standing in each.results.standings]
    longest = max(len(standing.name) for standing in standings)
    own_line = longest > width // 3  # a long name stands above its bar
    indent = 2 if own_line else longest + 1
    columns = max(10, width - indent - _NUMBERS)
    highest = 100 * max(max(s.accuracy.high, s.accuracy.value) for s in standings)
    end = next(scale for scale in _SCALES if scale >= min(100, highest))
    lines: list[Text] = []
    for each in evaluations:
        lines += [
            *_heading(each, len(evaluations) > 1),
            Text(f"{accuracy_name([each])} % (├──●──┤: its 95 % interval)"),
        ]
        for standing in each.results.standings:
            text = _accuracy_bar(standing.accuracy, end, columns).append(f" {share(standing.accuracy)}")
            lines += _row(standing.name, text, indent, own_line)
        lines += [Text(" " * indent + "└" + "─" * (columns - 1), "dim")]
        lines += [Text(" " * indent + between("0", "", f"{end} %", columns), "dim")]
        lines += _costs(each.results.standings, max(s.flops for s in standings), indent, columns, own_line)
        lines.append(Text())
    return lines[:-1]


def _heading(evaluation: Evaluation, several: bool) -> list[Text]:
    label = f"{evaluation.label}: " if several else ""
    return [Text(label + evaluation.describe(), "bold")]


def _row(name: str, text: Text, indent: int, own_line: bool) -> list[Text]:
    if own_line:
        return [Text(name), Text(" " * indent).append_text(text)]
    return [Text(name.ljust(indent)).append_text(text)]


def _accuracy_bar(accuracy: Estimate, end: float, columns: int) -> Text:
    """A bar to the accuracy, and the interval over it."""

    def column(value: float) -> int:
        return min(columns - 1, math.floor(100 * value / end * columns))

    value, low, high = column(accuracy.value), column(accuracy.low), column(accuracy.high)
    cells = ["█" if i < value else " " for i in range(columns)]
    for i in range(low, high + 1):
        cells[i] = "─"
    cells[low], cells[high] = "├", "┤"
    cells[value] = "●"
    first = min(low, value)
    return Text("".join(cells[:first]), "cyan").append("".join(cells[first:]), "default")


def _costs(
    standings: Sequence[Standing], most: float, indent: int, columns: int, own_line: bool
) -> list[Text]:
    """A bar for each method; none where no answer was given."""
    if not most:
        return []
    lines = [Text("FLOPs of an answer (2 · parameters · tokens)")]
    for standing in standings:
        text = Text(bar(standing.flops / most, columns), "yellow").append(
            f" {flops(standing.flops)}", "default"
        )
        lines += _row(standing.name, text, indent, own_line)
    return lines
