"""Traces: each token's entropy before and after EM, and which tokens EM changed; answers below each other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from emlocal.errors import UsageError
from emlocal.plotting.picture.figure import legend_above, new_figure, plain_axes
from emlocal.plotting.traces import TracedAnswer, shown_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 16
"""Answers in a figure: below each other they must still fit a page."""
_WORDS = 70  # tokens: as many can stand beside each other
_WIDTH, _HEIGHT, _LABELS = 12.0, 1.9, 0.7  # inches: of the figure, of a panel, of the words below it
_BEFORE, _AFTER, _CHANGED = "#c3c9d2", "#2f6fb3", "#d1242f"

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
        _draw(axes, answer, top)
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


def _draw(axes: "Axes", answer: TracedAnswer, top: float) -> None:
    """A bar for each token; below them a mark for each that EM changed."""
    places = range(1, len(answer.draws) + 1)
    before = [draw.entropy_before for draw in answer.draws]
    after = [draw.entropy_after for draw in answer.draws]
    width = 0.85 if len(before) <= _WORDS else 1.0
    if answer.summary.touched:
        axes.bar(places, before, color=_BEFORE, label=_NAME_BEFORE, width=width, linewidth=0)
        axes.bar(places, after, color=_AFTER, label=_NAME_AFTER, width=width, linewidth=0)
    else:
        axes.bar(places, before, color=_AFTER, label="entropy (EM did nothing)", width=width, linewidth=0)
    changed = [place for place, is_changed in zip(places, answer.changed, strict=True) if is_changed]
    if changed:
        axes.plot(
            changed,
            [-0.06 * top] * len(changed),
            linestyle="none",
            marker="^",
            markersize=5 if len(before) <= _WORDS else 3,
            color=_CHANGED,
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
            label.set_color(_CHANGED)
