"""Training runs: a panel for each thing that any of them measured, a line for each run."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from emlocal.plotting.picture.figure import legend_above, new_figure, plain_axes
from emlocal.plotting.runs import RunMetrics, panels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 4.2, 2.7  # of a panel, inches


def draw_runs(runs: Sequence[RunMetrics]) -> "Figure":
    """The figure of all runs.

    Raises UsageError where there is nothing to draw, BackendError where matplotlib is missing.
    """
    panels = panels_of(runs)
    columns = min(len(panels), 3 if len(panels) > 4 else 2)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(_WIDTH * columns, _HEIGHT * rows + 0.4)
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
