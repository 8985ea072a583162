"""Plots of evaluations from their results.json: accuracies with intervals, and the cost of an answer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from emlocal.evaluation.report.document import Results, Standing, read_results
from emlocal.evaluation.report.page import (
    draw_accuracy_against_cost,
    draw_risk_against_coverage,
    looks,
)
from emlocal.evaluation.report.texts import flops, share
from emlocal.evaluation.results import Estimate
from emlocal.evaluation.selective import COVERAGES
from emlocal.plotting import bar, between, labels, new_figure, plain_axes
from emlocal.text import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Evaluation:
    """An evaluation with its label."""

    label: str
    results: Results

    def describe(self) -> str:
        """Names the task and the model; accuracies can only be compared if both are equal."""
        found = self.results
        return f"{found.task}, {counted(found.problems, 'problem')}, {found.model}"


def read_evaluations(paths: Sequence[Path]) -> list[Evaluation]:
    """Reads these results.json and labels them by as many folder names as make them differ.

    Raises UsageError for a file that is not a results.json, has another version or is damaged.
    """
    folders = [path.parent if path.name == "results.json" else path for path in paths]
    pairs = zip(labels(folders, "an evaluation"), paths, strict=True)
    return [Evaluation(label, read_results(path)) for label, path in pairs]


def accuracy_name(evaluations: Sequence[Evaluation]) -> str:
    """Returns "accuracy", or "mean@4" if all evaluations have that many answers to each question."""
    ks = {max(standing.repetitions for standing in each.results.standings) for each in evaluations}
    return "accuracy" if len(ks) > 1 or ks == {1} else f"mean@{ks.pop()}"


_WIDTH, _LETTER, _LEAST = 10.0, 0.08, 3.4  # inches; a letter is one of a method's name
_ROW = 0.42  # inches for each method and each heading


def draw_evaluations(evaluations: Sequence[Evaluation]) -> "Figure":
    """Draws a figure of all evaluations. Raises BackendError if matplotlib is missing."""
    rows: list[Evaluation | Standing] = []
    for each in evaluations:
        rows += [each, *each.results.standings]
    standings = [row for row in rows if isinstance(row, Standing)]
    names = _LETTER * max(len(standing.name) for standing in standings)
    drawn_as = looks([[standing.name for standing in each.results.standings] for each in evaluations])
    costs = any(standing.flops for standing in standings)
    risks = any(standing.risks for standing in standings)
    panels = 1 + costs + risks
    figure = new_figure(_WIDTH / 2 * max(2, panels) + names, max(_LEAST, _ROW * len(rows) + 1.2))
    left = figure.add_subplot(1, panels, 1)
    _draw_accuracies(left, rows, drawn_as, several=len(evaluations) > 1)
    left.set_xlabel(f"{accuracy_name(evaluations)} %")
    if costs:
        right = figure.add_subplot(1, panels, 2)
        draw_accuracy_against_cost(right, standings, drawn_as)
        right.set_ylabel(f"{accuracy_name(evaluations)} %")
        plain_axes(right, "Accuracy against cost")
    if risks:
        last = figure.add_subplot(1, panels, panels)
        draw_risk_against_coverage(last, standings, drawn_as)
        plain_axes(last, "Risk against coverage")
    return figure


def _draw_accuracies(
    axes: "Axes",
    rows: Sequence[Evaluation | Standing],
    drawn_as: Iterable[Mapping[str, Any]],
    *,
    several: bool,
) -> None:
    """Draws a row for each method below its evaluation's heading, in the colours of the other panels."""
    names, colours, looks_left = [], [], iter(drawn_as)
    for place, row in enumerate(rows):
        if isinstance(row, Evaluation):
            names.append(f"{row.label}\n{row.describe()}" if several else row.describe())
            colours.append("black")
            continue
        look = next(looks_left)
        value, low, high = (100 * x for x in (row.accuracy.value, row.accuracy.low, row.accuracy.high))
        reach = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar([value], [place], xerr=reach, capsize=3, clip_on=False, **look)
        names.append(f"{row.name}\n{share(row.accuracy)}")
        colours.append(look["color"])
    axes.set_yticks(range(len(names)), names, parse_math=False)
    for label, colour in zip(axes.get_yticklabels(), colours, strict=True):
        label.set_color(colour)
        label.set_fontweight("bold" if colour == "black" else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    plain_axes(axes, "Accuracy, with 95 % intervals")
    axes.grid(visible=False, axis="y")


_SCALES = (5, 10, 20, 25, 50, 75, 100)  # percent at the end of the axis
_NUMBERS = 19  # columns of "100.0 (99.9–100.0)"


def show_evaluations(evaluations: Sequence[Evaluation], width: int) -> list[Text]:
    """Returns the lines to print; all evaluations share the same axes."""
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
        lines += _risks(each.results.standings, indent, width - indent, own_line)
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
    """Draws a bar up to the accuracy, with the interval over it."""

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


_RISK = 6  # columns of "100.0" and a space


def _risks(standings: Sequence[Standing], indent: int, columns: int, own_line: bool) -> list[Text]:
    """Returns a row of risks for each method, as many as fit; empty if no answer has a confidence."""
    if not any(standing.risks for standing in standings):
        return []
    places = range(len(COVERAGES))
    step = next((n for n in (1, 2, 5) if len(COVERAGES) // n * _RISK <= columns), len(COVERAGES))
    shown = places[step - 1 :: step]  # always includes 100 %
    heads = "".join(f"{100 * COVERAGES[i]:.0f} %".rjust(_RISK) for i in shown)
    lines = [Text("wrong %, most confident answers first"), Text(" " * indent + heads, "dim")]
    for standing in standings:
        if standing.risks:
            numbers = "".join(f"{100 * standing.risks[i].value:.1f}".rjust(_RISK) for i in shown)
            lines += _row(standing.name, Text(numbers), indent, own_line)
    return lines


def _costs(
    standings: Sequence[Standing], most: float, indent: int, columns: int, own_line: bool
) -> list[Text]:
    """Returns a bar for each method; empty if there are no answers."""
    if not most:
        return []
    lines = [Text("FLOPs per answer (2 · parameters · tokens)")]
    for standing in standings:
        text = Text(bar(standing.flops / most, columns), "yellow").append(
            f" {flops(standing.flops)}", "default"
        )
        lines += _row(standing.name, text, indent, own_line)
    return lines
