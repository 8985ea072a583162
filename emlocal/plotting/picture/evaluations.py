"""Evaluations: each method's accuracy with its interval, and beside it accuracy against cost."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from emlocal.evaluation.report.figures import draw_accuracy_against_cost, looks
from emlocal.evaluation.report.reading import Standing
from emlocal.evaluation.report.texts import share
from emlocal.plotting.evaluations import Evaluation, accuracy_name
from emlocal.plotting.picture.figure import new_figure, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _LETTER, _LEAST = 10.0, 0.08, 3.4  # inches; a letter is one of a method's name
_ROW = 0.42  # inches; a method has one, and so has a heading


def draw_evaluations(evaluations: Sequence[Evaluation]) -> "Figure":
    """The figure of all evaluations. Raises BackendError where matplotlib is missing."""
    rows: list[Evaluation | Standing] = []
    for each in evaluations:
        rows += [each, *each.results.standings]
    standings = [row for row in rows if isinstance(row, Standing)]
    names = _LETTER * max(len(standing.name) for standing in standings)
    figure = new_figure(_WIDTH + names, max(_LEAST, _ROW * len(rows) + 1.2))
    drawn_as = looks([[standing.name for standing in each.results.standings] for each in evaluations])
    costs = any(standing.flops for standing in standings)
    left = figure.add_subplot(1, 2 if costs else 1, 1)
    _draw_accuracies(left, rows, drawn_as, several=len(evaluations) > 1)
    left.set_xlabel(f"{accuracy_name(evaluations)} %")
    if costs:
        right = figure.add_subplot(1, 2, 2)
        draw_accuracy_against_cost(right, standings, drawn_as)
        right.set_ylabel(f"{accuracy_name(evaluations)} %")
        plain_axes(right, "Accuracy against cost")
    return figure


def _draw_accuracies(
    axes: "Axes",
    rows: Sequence[Evaluation | Standing],
    drawn_as: Iterable[Mapping[str, Any]],
    *,
    several: bool,
) -> None:
    """A row for each method, in the colours of the other panel, below the heading of its evaluation."""
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
