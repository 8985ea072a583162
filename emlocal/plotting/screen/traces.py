"""Traces on a terminal: columns of entropy along the tokens, and the answer with what EM changed in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.text import Text

from emlocal.formatting import counted
from emlocal.plotting.screen.frame import UPRIGHT, axis_width, framed
from emlocal.plotting.traces import TracedAnswer, shown_text

_ROWS = 7
_WIDEST = 3  # columns of a token
_AFTER, _TAKEN = "cyan", "dim"
_CHANGED = "red"
MOST_SPELLED = 400
"""Tokens of all answers together; beyond it the texts would bury the plots."""


@dataclass(frozen=True)
class _Column:
    """Of one token, or the mean of some."""

    before: float
    after: float
    changed: bool


def show_traces(answers: Sequence[TracedAnswer], width: int) -> list[Text]:
    """The lines to print; the axes are the same for all answers."""
    top = max(max(d.entropy_before, d.entropy_after) for answer in answers for d in answer.draws) or 1.0
    longest = max(len(answer.draws) for answer in answers)
    space = width - axis_width(0, top)
    tokens = -(-longest // space)  # in a column
    columns = min(_WIDEST, max(1, space // longest))  # of a token
    spelled = sum(len(answer.draws) for answer in answers) <= MOST_SPELLED
    lines = _legend(answers, tokens)
    for answer in answers:
        found = _columns(answer, tokens)
        lines += [Text(), Text(answer.label, "bold"), Text(answer.describe())]
        end = f"token {len(answer.draws):,}"
        lines += framed(_rows(found, top, columns), 0, top, "1", "", end)
        lines.insert(-1, _marks(found, columns, axis_width(0, top)))
        if spelled:
            lines.append(_spelled(answer))
    if not spelled:
        lines += [Text(), Text(f"(the texts of more than {MOST_SPELLED} tokens are not shown)", "dim")]
    return lines


def _legend(answers: Sequence[TracedAnswer], tokens: int) -> list[Text]:
    line = Text("entropy, nats: ")
    line.append("█", _AFTER)
    if any(answer.summary.touched for answer in answers):
        line.append(" after EM  ").append("░", _TAKEN).append(" taken away by EM  ")
        line.append("▴", _CHANGED).append(" ‹ › another token without EM")
    else:
        line.append(" of each token (EM did nothing)")
    return (
        [line, Text(f"(a column is the mean of {counted(tokens, 'token')})", "dim")] if tokens > 1 else [line]
    )


def _columns(answer: TracedAnswer, tokens: int) -> list[_Column]:
    """The tokens of an answer, so many in each."""
    starts = range(0, len(answer.draws), tokens)
    groups = [(answer.draws[i : i + tokens], answer.changed[i : i + tokens]) for i in starts]
    return [
        _Column(fmean(d.entropy_before for d in draws), fmean(d.entropy_after for d in draws), any(changed))
        for draws, changed in groups
    ]


def _rows(columns: Sequence[_Column], top: float, width: int) -> list[Text]:
    """The columns as rows of characters, the uppermost first; wide ones have a gap between them."""
    gap = " " * (width > 1)
    heights = [
        (round(8 * _ROWS * column.after / top), round(8 * _ROWS * column.before / top)) for column in columns
    ]
    rows = []
    for below in range(8 * (_ROWS - 1), -1, -8):
        row = Text()
        for after, before in heights:
            cell = _cell(after - below, before - below)
            row.append(cell.plain * (width - len(gap)), cell.style).append(gap)
        rows.append(row)
    return rows


def _cell(after: int, before: int) -> Text:
    """A character, of eighths from its foot on."""
    if after > 0:
        return Text(UPRIGHT[min(8, after)], _AFTER)
    return Text("░", _TAKEN) if before >= 4 else Text(" ")


def _marks(columns: Sequence[_Column], width: int, indent: int) -> Text:
    """Below each column that holds a token that EM changed."""
    return Text(" " * indent).append(
        "".join(("▴" if c.changed else " ").ljust(width) for c in columns), _CHANGED
    )


def _spelled(answer: TracedAnswer) -> Text:
    """The answer; what EM changed stands in ‹ ›."""
    line = Text()
    for text, changed in zip(answer.texts, answer.changed, strict=True):
        if changed:
            line.append(f"‹{shown_text(text)}›", _CHANGED)
        else:
            line.append(shown_text(text))
    return line
