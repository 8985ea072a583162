"""Traces of `emlocal generate`: answers token by token, with the entropy before and after EM."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.text import Text

from emlocal.errors import UsageError
from emlocal.generation.sample import EntropySummary, summarize
from emlocal.plotting import (
    UPRIGHT,
    axis_width,
    finite,
    framed,
    labels,
    legend_above,
    new_figure,
    plain_axes,
    read_bytes,
)
from emlocal.sampling import Draw
from emlocal.text import change, counted, harmless

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_HINT = "give what --trace of generate wrote"


@dataclass(frozen=True)
class TracedAnswer:
    """An answer, token by token."""

    label: str
    texts: tuple[str, ...]
    draws: tuple[Draw, ...]

    @cached_property
    def summary(self) -> EntropySummary:
        """What EM did to it."""
        return summarize(self.draws)

    @property
    def changed(self) -> list[bool]:
        """By token: whether the same draw would have made another one without EM."""
        return [draw.token != draw.token_without_em for draw in self.draws]

    def describe(self) -> str:
        """Its figures in a line: "119 tokens, entropy 1.69 → 0.22 nats, EM changed 39 tokens (33 %)"."""
        found = self.summary
        touched = found.touched > 0
        said = (
            f"{counted(found.tokens, 'token')}, entropy {change(found.before, found.after, touched)} nats, "
        )
        if not touched:
            return said + "EM touched none"
        return said + f"EM touched {found.touched:.0%}, changed {sum(self.changed):,} ({found.changed:.0%})"


def read_traces(paths: Sequence[Path]) -> list[TracedAnswer]:
    """The answers of all traces, labelled by file, and by number where a file has several.

    Raises UsageError for a file that is no trace, is empty or torn; it names the line.
    """
    found = []
    for label, path in zip(labels(paths, "a trace"), paths, strict=True):
        answers = _read(path)
        for sample, (texts, draws) in sorted(answers.items()):
            name = f"{label}, answer {sample + 1}" if len(answers) > 1 else label
            found.append(TracedAnswer(name, tuple(texts), tuple(draws)))
    return found


def shown_text(text: str) -> str:
    """A token's text in one line, ∅ for none: that of the end, for example."""
    return harmless(text.replace("\n", "⏎").replace("\t", "⇥")) or "∅"


def _read(path: Path) -> dict[int, tuple[list[str], list[Draw]]]:
    """Texts and draws of a file by sample. Lines end at line feeds alone: texts may hold other separators."""
    lines = read_bytes(path).split(b"\n")
    whole = lines[-1] == b""
    if whole:
        lines.pop()
    if not lines:
        raise UsageError(f"{path} is empty: a trace has a line for each token", _HINT)
    answers: dict[int, tuple[list[str], list[Draw]]] = {}
    for number, line in enumerate(lines, 1):
        row = _row(line)
        draw = None if row is None else _draw(row)
        if row is None or draw is None:
            if number == len(lines) and answers and not whole:
                raise UsageError(
                    f"{path} is torn: its last line, {number:,}, is not whole", "write the trace again"
                )
            raise UsageError(f"{path} is no trace: line {number:,} is no token's", _HINT)
        texts, draws = answers.setdefault(row["sample"], ([], []))
        if row["index"] != len(texts):
            raise UsageError(
                f"{path}, line {number:,}: token {row['index']:,} of answer {row['sample'] + 1:,} comes after"
                f" {counted(len(texts), 'token')}; the file has lost lines, or is of several traces",
                "give each trace as a file of its own",
            )
        texts.append(row["text"])
        draws.append(draw)
    return answers


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _draw(row: dict[str, Any]) -> Draw | None:
    """The draw of a line; None where it is not what `generate` writes."""
    whole = [row.get(name) for name in ("sample", "index", "token", "steps", "token_without_em")]
    numbers = [finite(row.get(name)) for name in ("entropy_before", "entropy_after", "p_before", "p_after")]
    if not isinstance(row.get("text"), str) or not all(type(n) is int and n >= 0 for n in whole):
        return None
    if any(n is None or n < 0 for n in numbers):
        return None
    return Draw(**{name: row[name] for name in Draw._fields})


MOST = 16
"""Answers in a figure: below each other they must still fit a page."""
_WORDS = 70  # tokens: as many can stand beside each other
_WIDTH, _HEIGHT, _LABELS = 12.0, 1.9, 0.7  # inches: of the figure, of a panel, of the words below it
_BEFORE_COLOUR, _AFTER_COLOUR, _CHANGED_COLOUR = "#c3c9d2", "#2f6fb3", "#d1242f"

_NAME_BEFORE, _NAME_AFTER, _NAME_CHANGED = "before EM", "after EM", "another token without EM"


def draw_traces(answers: Sequence[TracedAnswer]) -> "Figure":
    """The figure of all answers; the axis of entropy is the same for all.

    Raises UsageError for more answers than fit, BackendError where matplotlib is missing.
    """
    if len(answers) > MOST:
        raise UsageError(
            f"these are {len(answers):,} answers; a picture holds {MOST}",
            "give fewer traces, or leave -o out: the terminal shows any number",
        )
    tokens = max(len(answer.draws) for answer in answers)
    words = tokens <= _WORDS
    figure = new_figure(_WIDTH, (_HEIGHT + _LABELS * words) * len(answers) + 0.6)
    top = max(max(d.entropy_before, d.entropy_after) for answer in answers for d in answer.draws) or 1.0
    for i, answer in enumerate(answers):
        axes = figure.add_subplot(len(answers), 1, i + 1)
        _draw_bars(axes, answer, top)
        plain_axes(axes, f"{answer.label}: {answer.describe()}")
        axes.set_xlim(0.3, tokens + 0.7)
        axes.set_ylim(-0.12 * top, 1.05 * top)
        axes.set_ylabel("entropy, nats")
        if words:
            _label_tokens(axes, answer)
        elif i == len(answers) - 1:
            axes.set_xlabel("token")
    legend_above(figure, [_NAME_BEFORE, _NAME_AFTER, _NAME_CHANGED])
    return figure


def _draw_bars(axes: "Axes", answer: TracedAnswer, top: float) -> None:
    """A bar for each token; below them a mark for each that EM changed."""
    places = range(1, len(answer.draws) + 1)
    before = [draw.entropy_before for draw in answer.draws]
    after = [draw.entropy_after for draw in answer.draws]
    width = 0.85 if len(before) <= _WORDS else 1.0
    if answer.summary.touched:
        axes.bar(places, before, color=_BEFORE_COLOUR, label=_NAME_BEFORE, width=width, linewidth=0)
        axes.bar(places, after, color=_AFTER_COLOUR, label=_NAME_AFTER, width=width, linewidth=0)
    else:
        axes.bar(
            places, before, color=_AFTER_COLOUR, label="entropy (EM did nothing)", width=width, linewidth=0
        )
    changed = [place for place, is_changed in zip(places, answer.changed, strict=True) if is_changed]
    if changed:
        axes.plot(
            changed,
            [-0.06 * top] * len(changed),
            linestyle="none",
            marker="^",
            markersize=5 if len(before) <= _WORDS else 3,
            color=_CHANGED_COLOUR,
            label=_NAME_CHANGED,
        )
    axes.axhline(0, color="black", linewidth=0.6)


def _label_tokens(axes: "Axes", answer: TracedAnswer) -> None:
    """The tokens themselves along the axis, red where EM changed them."""
    axes.set_xticks(
        range(1, len(answer.texts) + 1),
        [shown_text(text) for text in answer.texts],
        rotation=90,
        fontsize=8,
        family="monospace",
        parse_math=False,
    )
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    for label, changed in zip(axes.get_xticklabels(), answer.changed, strict=True):
        if changed:
            label.set_color(_CHANGED_COLOUR)


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
