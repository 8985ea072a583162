"""Plots of traces of `emlocal generate`: answers token by token, with the entropy before and after EM."""

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


_HINT = "name a file that generate --trace wrote"


@dataclass(frozen=True)
class TracedAnswer:
    """An answer, token by token."""

    label: str
    texts: tuple[str, ...]
    draws: tuple[Draw, ...]

    @cached_property
    def summary(self) -> EntropySummary:
        """Statistics of the answer's entropies and of EM's effect."""
        return summarize(self.draws)

    @property
    def changed(self) -> list[bool]:
        """For each token, whether the same draw without EM would have given another token."""
        return [draw.token != draw.token_without_em for draw in self.draws]

    def describe(self) -> str:
        """Describes the answer in a line.

        For example "119 tokens, entropy 1.69 → 0.22 nats, EM touched 88%, changed 39 (33%)".
        """
        found = self.summary
        touched = found.touched > 0
        said = (
            f"{counted(found.tokens, 'token')}, entropy {change(found.before, found.after, touched)} nats, "
        )
        if not touched:
            return said + "EM touched none"
        return said + f"EM touched {found.touched:.0%}, changed {sum(self.changed):,} ({found.changed:.0%})"


def read_traces(paths: Sequence[Path]) -> list[TracedAnswer]:
    """Reads the answers of all traces; labels them by file and, if a file has several, by number.

    Raises UsageError for a file that is not a trace, is empty or is torn; it names the line.
    """
    found = []
    for label, path in zip(labels(paths, "a trace"), paths, strict=True):
        answers = _read(path)
        for sample, (texts, draws) in sorted(answers.items()):
            name = f"{label}, answer {sample + 1}" if len(answers) > 1 else label
            found.append(TracedAnswer(name, tuple(texts), tuple(draws)))
    return found


def shown_text(text: str) -> str:
    """Returns a token's text on one line; ∅ if it is empty, like an end token."""
    return harmless(text.replace("\n", "⏎").replace("\t", "⇥")) or "∅"


def _read(path: Path) -> dict[int, tuple[list[str], list[Draw]]]:
    """Returns texts and draws by sample. Only line feeds end a line: texts may contain other separators."""
    lines = read_bytes(path).split(b"\n")
    whole = lines[-1] == b""
    if whole:
        lines.pop()
    if not lines:
        raise UsageError(f"{path} is empty; a trace has a line for each token", _HINT)
    answers: dict[int, tuple[list[str], list[Draw]]] = {}
    for number, line in enumerate(lines, 1):
        row = _row(line)
        draw = None if row is None else _draw(row)
        if row is None or draw is None:
            if number == len(lines) and answers and not whole:
                raise UsageError(
                    f"{path} is cut off: its last line, {number:,}, is incomplete", "write the trace again"
                )
            raise UsageError(f"{path} is not a trace: line {number:,} is not a token", _HINT)
        texts, draws = answers.setdefault(row["sample"], ([], []))
        if row["index"] != len(texts):
            raise UsageError(
                f"{path}, line {number:,}: token {row['index']:,} of answer {row['sample'] + 1:,} comes after"
                f" {counted(len(texts), 'token')}; the file lacks lines, or has several traces",
                "put each trace into its own file",
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
    """Returns the draw in a line, or None if `generate` did not write it."""
    whole = [row.get(name) for name in ("sample", "index", "token", "steps", "token_without_em")]
    numbers = [finite(row.get(name)) for name in ("entropy_before", "entropy_after", "p_before", "p_after")]
    if not isinstance(row.get("text"), str) or not all(type(n) is int and n >= 0 for n in whole):
        return None
    if any(n is None or n < 0 for n in numbers):
        return None
    return Draw(**{name: row[name] for name in Draw._fields})


MOST = 16
"""Maximum number of answers in a figure: one below the other, they must fit on a page."""
_WORDS = 70  # maximum number of tokens whose texts fit side by side
# inches: width of the figure, height of a panel, height of the texts below it
_WIDTH, _HEIGHT, _LABELS = 12.0, 1.9, 0.7
_BEFORE_COLOUR, _AFTER_COLOUR, _CHANGED_COLOUR = "#c3c9d2", "#2f6fb3", "#d1242f"

_NAME_BEFORE, _NAME_AFTER, _NAME_CHANGED = "before EM", "after EM", "another token without EM"


def draw_traces(answers: Sequence[TracedAnswer]) -> "Figure":
    """Draws a figure of all answers; all share the same axis of entropy.

    Raises UsageError for more answers than fit, and BackendError if matplotlib is missing.
    """
    if len(answers) > MOST:
        raise UsageError(
            f"the traces have {len(answers):,} answers; a picture shows at most {MOST}",
            "name fewer traces, or leave -o out to plot on the terminal",
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
    """Draws a bar for each token, and a mark below each token that EM changed."""
    places = range(1, len(answer.draws) + 1)
    before = [draw.entropy_before for draw in answer.draws]
    after = [draw.entropy_after for draw in answer.draws]
    width = 0.85 if len(before) <= _WORDS else 1.0
    if answer.summary.touched:
        axes.bar(places, before, color=_BEFORE_COLOUR, label=_NAME_BEFORE, width=width, linewidth=0)
        axes.bar(places, after, color=_AFTER_COLOUR, label=_NAME_AFTER, width=width, linewidth=0)
    else:
        axes.bar(
            places,
            before,
            color=_AFTER_COLOUR,
            label="entropy (EM changed nothing)",
            width=width,
            linewidth=0,
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
    """Writes the tokens along the axis, in red where EM changed them."""
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
_WIDEST = 3  # maximum number of columns for a token
_AFTER, _TAKEN = "cyan", "dim"
_CHANGED = "red"
MOST_SPELLED = 400
"""Maximum number of tokens, over all answers, whose texts are shown; more would bury the plots."""


@dataclass(frozen=True)
class _Column:
    """Entropy of one token, or the mean of several."""

    before: float
    after: float
    changed: bool


def show_traces(answers: Sequence[TracedAnswer], width: int) -> list[Text]:
    """Returns the lines to print; all answers share the same axes."""
    top = max(max(d.entropy_before, d.entropy_after) for answer in answers for d in answer.draws) or 1.0
    longest = max(len(answer.draws) for answer in answers)
    space = width - axis_width(0, top)
    tokens = -(-longest // space)  # tokens in a column
    columns = min(_WIDEST, max(1, space // longest))  # columns of a token
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
        line.append(" after EM  ").append("░", _TAKEN).append(" removed by EM  ")
        line.append("▴", _CHANGED).append(" ‹ › another token without EM")
    else:
        line.append(" of each token (EM changed nothing)")
    return (
        [line, Text(f"(each column is the mean of {counted(tokens, 'token')})", "dim")]
        if tokens > 1
        else [line]
    )


def _columns(answer: TracedAnswer, tokens: int) -> list[_Column]:
    """Groups an answer's tokens into columns of `tokens` each."""
    starts = range(0, len(answer.draws), tokens)
    groups = [(answer.draws[i : i + tokens], answer.changed[i : i + tokens]) for i in starts]
    return [
        _Column(fmean(d.entropy_before for d in draws), fmean(d.entropy_after for d in draws), any(changed))
        for draws, changed in groups
    ]


def _rows(columns: Sequence[_Column], top: float, width: int) -> list[Text]:
    """Draws the columns as rows of characters, from the top down; wide columns have a gap between them."""
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
    """Returns one character; `after` and `before` are heights above its foot, in eighths."""
    if after > 0:
        return Text(UPRIGHT[min(8, after)], _AFTER)
    return Text("░", _TAKEN) if before >= 4 else Text(" ")


def _marks(columns: Sequence[_Column], width: int, indent: int) -> Text:
    """Draws a mark below each column with a token that EM changed."""
    return Text(" " * indent).append(
        "".join(("▴" if c.changed else " ").ljust(width) for c in columns), _CHANGED
    )


def _spelled(answer: TracedAnswer) -> Text:
    """Returns the answer's text, with ‹ › around tokens that EM changed."""
    line = Text()
    for text, changed in zip(answer.texts, answer.changed, strict=True):
        if changed:
            line.append(f"‹{shown_text(text)}›", _CHANGED)
        else:
            line.append(shown_text(text))
    return line
