"""From paths to a plot, whatever kind they are of."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal.plotting.sources import folder_of, kind_of, results_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.text import Text


def write_picture(paths: Sequence[Path], output: Path) -> None:
    """Draw what the paths hold into a .png, .svg or .pdf file.

    Raises UsageError for paths of different kinds, or that hold nothing to draw, and for a file that is no
    picture; BackendError where matplotlib is missing; EmlocalError where something cannot be read or written.
    """
    from emlocal.plotting.figure import check_name, save

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
