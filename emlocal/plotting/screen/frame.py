"""Axes around rows of characters, and bars."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

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
