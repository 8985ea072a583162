"""Figures of training runs, evaluations and traces, as pictures or as plots on a terminal.

This module holds the shared parts: the kind of a path, labels, pictures, and plots of characters. Those have
axes around rows, bars, and lines of braille dots, two by four in a character. `runs`, `evaluations` and
`traces` each read and draw one kind.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.text import Text

from emlocal.errors import BackendError, EmlocalError, UsageError
from emlocal.files import atomic_path
from emlocal.text import harmless

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Kind = Literal["run", "evaluation", "trace"]

METRICS, RESULTS = "metrics.jsonl", "results.json"
_ARTICLES = {"run": "a training run", "evaluation": "an evaluation", "trace": "a trace"}
_HINT = "name a folder of finetune, rl or eval (-o), or a file of generate --trace"


def kind_of(paths: Sequence[Path]) -> Kind:
    """Returns the kind of the paths, which must be the same for all.

    Raises UsageError for a path that is missing or of no known kind, and for paths of different kinds, which
    have no axis in common.
    """
    kinds = [_kind(path) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if kind != kinds[0]:
            raise UsageError(
                f"{paths[0]} is {_ARTICLES[kinds[0]]} and {path} is {_ARTICLES[kind]};"
                " they cannot share a plot",
                "plot each kind with its own command",
            )
    return kinds[0]


def folder_of(path: Path) -> Path:
    """Returns a run's folder, given the folder or its file of metrics."""
    return path if path.is_dir() else path.parent


def results_of(path: Path) -> Path:
    """Returns an evaluation's results.json, given its folder or the file itself."""
    return path / RESULTS if path.is_dir() else path


def _kind(path: Path) -> Kind:
    """Returns a path's kind by its name; the kind's own reader checks the content."""
    if not path.exists():
        raise UsageError(f"{path} does not exist", _HINT)
    if not path.is_dir():
        return "run" if path.name == METRICS else "evaluation" if path.suffix == ".json" else "trace"
    if (path / METRICS).exists():
        return "run"
    if (path / RESULTS).exists():
        return "evaluation"
    if (path / "answers").is_dir():
        raise UsageError(
            f"the evaluation in {path} is not finished: there is no {RESULTS}",
            "run its command again to resume it",
        )
    raise UsageError(f"{path} has neither a run ({METRICS}) nor an evaluation ({RESULTS})", _HINT)


def read_bytes(path: Path) -> bytes:
    """Reads a file.

    Raises UsageError if it is missing, and EmlocalError if it cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} does not exist") from None
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why


def finite(value: object) -> float | None:
    """Returns a JSON value as a finite number, or None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def labels(paths: Sequence[Path], what: str) -> list[str]:
    """Returns labels for the paths: their last parts, as many as make them differ.

    `what` names the kind in the error. Raises UsageError for a path that is given twice.
    """
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise UsageError(f"{what} is given twice", "name each only once")
    # a link keeps its own name
    named = [path.resolve() if ".." in path.parts else path.absolute() for path in paths]
    found = [path.name for path in named]
    for parts in range(2, max(len(path.parts) for path in named) + 1):
        if len(set(found)) == len(found):
            break
        found = ["/".join(path.parts[-parts:]) for path in named]
    return [harmless(label) for label in found]


def write_picture(paths: Sequence[Path], output: Path) -> None:
    """Draws the content of the paths into a .png, .svg or .pdf file.

    Raises UsageError for paths of different kinds or without anything to draw, and for another file type.
    Raises BackendError if matplotlib is missing, and EmlocalError if a file cannot be read or written.
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
    """Returns the content of the paths as lines for a terminal of `width` columns.

    Raises UsageError for paths of different kinds or without anything to draw, and EmlocalError if a file
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
_DOTS = 150  # dots per inch of a PNG


def check_name(path: Path) -> None:
    """Raises UsageError for a file name that does not end in .png, .svg or .pdf."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} is not a picture", f"use a name that ends in {', '.join(FORMATS)}")


def new_figure(width: float, height: float) -> "Figure":
    """Creates an empty figure; sizes in inches. Raises BackendError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as why:
        raise BackendError("figures need the package matplotlib", "pip install 'emlocal[plot]'") from why
    return Figure(figsize=(width, height), layout="constrained")


def plain_axes(axes: "Axes", title: str) -> None:
    """Sets a title on the left and a faint grid, and removes the frame above and to the right.

    The title is not parsed as a formula.
    """
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(figure: "Figure", order: Sequence[str] = ()) -> None:
    """Adds one legend for all panels with each name once; the names in `order` come first, in that order."""
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
    """Writes the picture and replaces an old one whole. Raises EmlocalError if it cannot be written."""
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # the font draws a box for a script that it lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(temporary, format=path.suffix.lower().removeprefix("."), dpi=_DOTS)


_EIGHTHS = " ▏▎▍▌▋▊▉"
UPRIGHT = " ▁▂▃▄▅▆▇█"
STYLES = ("cyan", "yellow", "magenta", "green", "red", "blue")
"""Colours of the items in a plot, used in turn."""


def axis_width(low: float, high: float) -> int:
    """Returns the number of columns for the numbers and the line of `framed`."""
    return max(len(short(low)), len(short(high))) + 2


def framed(rows: Sequence[Text], low: float, high: float, left: str, middle: str, right: str) -> list[Text]:
    """Adds axes to the rows (highest first): numbers on the left, and the named ends of the axis below."""
    numbers = axis_width(low, high) - 2
    found = []
    for i, row in enumerate(rows):
        number = short(high) if i == 0 else short(low) if i == len(rows) - 1 else ""
        found.append(Text(f"{number:>{numbers}} {'┤' if number else '│'}", "dim").append_text(row))
    width = max(row.cell_len for row in rows)
    pad = " " * (numbers + 1)
    found.append(Text(f"{pad}└{'─' * width}", "dim"))
    found.append(Text(f"{pad} {between(left, middle, right, width)}", "dim"))
    return found


def between(left: str, middle: str, right: str, width: int) -> str:
    """Returns the labels of an axis: its ends and, if there is room, its name in the middle."""
    gap = width - cell_len(left) - cell_len(right)
    if gap < cell_len(middle) + 2:
        return left + " " * max(1, gap) + right
    before = (gap - cell_len(middle)) // 2
    return left + " " * before + middle + " " * (gap - cell_len(middle) - before) + right


def bar(share: float, width: int) -> str:
    """Returns a horizontal bar over a share of the width, exact to 1/8 column and padded to the width."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)


def short(number: float) -> str:
    """Formats a number with three digits: "0.217", "1.74", "119", "2.5e+10"."""
    return f"{number:.3g}" if abs(number) < 1000 or abs(number) >= 1e6 else f"{number:.0f}"


_BRAILLE = 0x2800
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of the dots by column and row within a character, from the top row down."""
Point = tuple[float, float]
"""A position between (0, 0), bottom left, and (1, 1)."""


class Canvas:
    """A plot of lines, each in its own colour.

    With `letters`, each line is drawn in characters with its own letter (a, b, …). That tells lines apart
    without colours.
    """

    def __init__(self, columns: int, rows: int, *, letters: bool = False) -> None:
        self._columns, self._rows = columns, rows
        self._letters = letters
        self._cells: dict[tuple[int, int], dict[int, int]] = {}

    def line(self, points: Sequence[Point], number: int) -> None:
        """Connects the points with the line of this number."""
        width, height = 2 * self._columns - 1, 4 * self._rows - 1
        dots = [(round(x * width), round((1 - y) * height)) for x, y in points]
        for start, end in zip(dots, dots[1:] or dots, strict=False):
            steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
            for i in range(steps + 1):
                self._dot(
                    round(start[0] + (end[0] - start[0]) * i / steps),
                    round(start[1] + (end[1] - start[1]) * i / steps),
                    number,
                )

    def _dot(self, x: int, y: int, number: int) -> None:
        cell = self._cells.setdefault((x // 2, y // 4), {})
        cell[number] = cell.get(number, 0) | _BITS[x % 2][y % 4]

    def rows(self) -> list[Text]:
        """Returns the rows, from the top down."""
        found = []
        for y in range(self._rows):
            row = Text()
            for x in range(self._columns):
                row.append_text(self._character(self._cells.get((x, y), {})))
            found.append(row)
        return found

    def _character(self, cell: dict[int, int]) -> Text:
        if not cell:
            return Text(" ")
        number = max(cell)
        if self._letters:
            return Text(letter(number) if len(cell) == 1 else "+")
        bits = 0
        for mask in cell.values():
            bits |= mask
        return Text(chr(_BRAILLE + bits), STYLES[number % len(STYLES)])


def letter(number: int) -> str:
    """Returns the letter for a line's number: a … z, A … Z, then again from a."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return letters[number % len(letters)]
