"""Figures of training runs, traces and evaluations: from paths to pictures and to plots on a terminal.

Here is what all have in common. What a path is, how it is read and labelled; pictures; and plots of
characters: axes around rows, bars, and lines as braille dots, two by four in a character. `runs`,
`evaluations` and `traces` read and draw one kind each.
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
_HINT = "give what -o of finetune, rl or eval was, or what --trace of generate wrote"


def kind_of(paths: Sequence[Path]) -> Kind:
    """What the paths are, all of them.

    Raises UsageError for one that is not there or is nothing of the kind, and for different kinds together:
    they have no axis in common.
    """
    kinds = [_kind(path) for path in paths]
    for path, kind in zip(paths, kinds, strict=True):
        if kind != kinds[0]:
            raise UsageError(
                f"{paths[0]} is {_ARTICLES[kinds[0]]} and {path} is {_ARTICLES[kind]}:"
                " they cannot be drawn together",
                "draw each kind by a command of its own",
            )
    return kinds[0]


def folder_of(path: Path) -> Path:
    """A run's folder, of the folder itself or its file of metrics."""
    return path if path.is_dir() else path.parent


def results_of(path: Path) -> Path:
    """An evaluation's results.json, of its folder or the file itself."""
    return path / RESULTS if path.is_dir() else path


def _kind(path: Path) -> Kind:
    """By the name: what is inside is for the kind's own reader to judge."""
    if not path.exists():
        raise UsageError(f"{path} is not there", _HINT)
    if not path.is_dir():
        return "run" if path.name == METRICS else "evaluation" if path.suffix == ".json" else "trace"
    if (path / METRICS).exists():
        return "run"
    if (path / RESULTS).exists():
        return "evaluation"
    if (path / "answers").is_dir():
        raise UsageError(
            f"the evaluation in {path} has not come to its end: there is no {RESULTS}",
            "run its command again: it goes on where it stopped",
        )
    raise UsageError(f"{path} holds no run ({METRICS}) and no evaluation ({RESULTS})", _HINT)


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises UsageError where there is no such file, EmlocalError where it cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is not there") from None
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why


def finite(value: object) -> float | None:
    """The number that a JSON value is; None where it is none, or none that has a place on an axis."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def labels(paths: Sequence[Path], what: str) -> list[str]:
    """The last parts of the paths, as many as make them different. `what` they are, for the error.

    Raises UsageError for a path that is given twice.
    """
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise UsageError(f"{what} is given twice", "give each once")
    # links go by their own names, as they were given
    named = [path.resolve() if ".." in path.parts else path.absolute() for path in paths]
    found = [path.name for path in named]
    for parts in range(2, max(len(path.parts) for path in named) + 1):
        if len(set(found)) == len(found):
            break
        found = ["/".join(path.parts[-parts:]) for path in named]
    return [harmless(label) for label in found]


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


_EIGHTHS = " ▏▎▍▌▋▊▉"
UPRIGHT = " ▁▂▃▄▅▆▇█"
STYLES = ("cyan", "yellow", "magenta", "green", "red", "blue")
"""Of the things in one plot, over and over."""


def axis_width(low: float, high: float) -> int:
    """Columns that the numbers and the line of `framed` take."""
    return max(len(short(low)), len(short(high))) + 2


def framed(rows: Sequence[Text], low: float, high: float, left: str, middle: str, right: str) -> list[Text]:
    """The rows, the highest first, with an axis on their left and one below, whose ends are named."""
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
    """The ends of an axis and what it is of; without the latter where there is no place."""
    gap = width - cell_len(left) - cell_len(right)
    if gap < cell_len(middle) + 2:
        return left + " " * max(1, gap) + right
    before = (gap - cell_len(middle)) // 2
    return left + " " * before + middle + " " * (gap - cell_len(middle) - before) + right


def bar(share: float, width: int) -> str:
    """A horizontal bar over a share of the width, to an eighth of a column, padded to the width."""
    eighths = round(min(1.0, max(0.0, share)) * width * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)


def short(number: float) -> str:
    """Three digits: "0.217", "1.74", "119", "2.5e+10"."""
    return f"{number:.3g}" if abs(number) < 1000 or abs(number) >= 1e6 else f"{number:.0f}"


_BRAILLE = 0x2800
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""By column and row within a character, the uppermost row first."""
Point = tuple[float, float]
"""From (0, 0), below on the left, to (1, 1)."""


class Canvas:
    """Lines over each other, each with a colour of its own.

    With `letters` a line is drawn with its letter (a, b, …) instead, a character at a time: that tells lines
    apart where there are no colours.
    """

    def __init__(self, columns: int, rows: int, *, letters: bool = False) -> None:
        self._columns, self._rows = columns, rows
        self._letters = letters
        self._cells: dict[tuple[int, int], dict[int, int]] = {}

    def line(self, points: Sequence[Point], number: int) -> None:
        """Join the points by the line of this number."""
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
        """The rows, the uppermost first."""
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
    """What stands for the line of this number: a … z, A … Z, and again."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return letters[number % len(letters)]
