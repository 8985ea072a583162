"""From paths to a plot, whatever kind they are of; and what all pictures have in common."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal.errors import BackendError, UsageError
from emlocal.files import atomic_path
from emlocal.plotting.sources import folder_of, kind_of, results_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.text import Text


def write_picture(paths: Sequence[Path], output: Path) -> None:
    """Draw what the paths hold into a .png, .svg or .pdf file.

    Raises UsageError for paths of different kinds, or that hold nothing to draw, and for a file that is no
    picture; BackendError where matplotlib is missing; EmlocalError where something cannot be read or written.
    """

    check_name(output)
    save(_figure(paths), output)


def _figure(paths: Sequence[Path]) -> "Figure":
    match kind_of(paths):
        case "run":
            from emlocal.plotting.runs import draw_runs, read_runs

            return draw_runs(read_runs([folder_of(path) for path in paths]))
        case "trace":
            from emlocal.plotting.traces import draw_traces, read_traces

            return draw_traces(read_traces(paths))
        case "evaluation":
            from emlocal.plotting.evaluations import draw_evaluations, read_evaluations

            return draw_evaluations(read_evaluations([results_of(path) for path in paths]))


def screen_lines(paths: Sequence[Path], width: int, *, colours: bool) -> "list[Text]":
    """What the paths hold as lines for a terminal of so many columns.

    Raises UsageError for paths of different kinds, or that hold nothing to draw; EmlocalError where something
    cannot be read.
    """
    match kind_of(paths):
        case "run":
            from emlocal.plotting.runs import read_runs, show_runs

            return show_runs(read_runs([folder_of(path) for path in paths]), width, colours=colours)
        case "trace":
            from emlocal.plotting.traces import read_traces, show_traces

            return show_traces(read_traces(paths), width)
        case "evaluation":
            from emlocal.plotting.evaluations import read_evaluations, show_evaluations

            return show_evaluations(read_evaluations([results_of(path) for path in paths]), width)


FORMATS = (".png", ".svg", ".pdf")
_DOTS = 150  # of a PNG, an inch


def check_name(path: Path) -> None:
    """Raise UsageError for a file that is no .png, .svg or .pdf."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} is no picture", f"give a name that ends in {', '.join(FORMATS)}")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, of inches. Raises BackendError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as why:
        raise BackendError("figures need the package matplotlib", "pip install 'emlocal[plot]'") from why
    return Figure(figsize=(width, height), layout="constrained")


def plain_axes(axes: "Axes", title: str) -> None:
    """A title on the left, a faint grid, no frame above and to the right. Titles hold no formulas."""
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(figure: "Figure", order: Sequence[str] = ()) -> None:
    """One legend for all panels, each name once; those of `order` stand in this order."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    handles = {name: handles[name] for name in order if name in handles} | handles
    legend = figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(4, len(handles)),
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def save(figure: "Figure", path: Path) -> None:
    """Write the picture; an old one is replaced whole. Raises EmlocalError where it cannot be written."""
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # a token in a script that the font lacks is shown as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(temporary, format=path.suffix.lower().removeprefix("."), dpi=_DOTS)
