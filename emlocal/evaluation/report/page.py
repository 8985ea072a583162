"""The HTML page and its figures: one file without scripts that fetches nothing.

Each figure is an SVG text of its own. `emlocal plot` draws accuracy against cost with the same functions.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from emlocal.errors import BackendError
from emlocal.evaluation.answering import Judged
from emlocal.evaluation.report import texts
from emlocal.evaluation.report.document import Document, Standing
from emlocal.evaluation.report.texts import accuracy_name, entropy_changed
from emlocal.evaluation.selective import COVERAGES
from emlocal.files import atomic_writer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_WIDTH, _HEIGHT = 7.2, 3.8  # inches
_APART = 0.015
"""Minimum distance between methods of the same cost, as a share of the axis; it keeps error bars apart."""
_MARGIN, _WIDE, _DECADE = 1.25, 2, 10
"""Margin around the costs, as a factor; and two ratios of the largest to the smallest cost.

From the first on, the axis is logarithmic; from the second on, it has fewer numbers.
"""
_MARKERS = "os^vDP"
_COLOURS = (
    *(f"C{i}" for i in range(10)),
    *("#13476c", "#994c08", "#1a601a", "#801718", "#593e71"),  # the same colours, darker
    *("#54342d", "#884774", "#4c4c4c", "#717114", "#0e727c"),
)


def standings_of(document: Document) -> list[Standing]:
    """Returns the standings of all methods."""
    return [Standing.of(method, document.confidence.get(method.name, ())) for method in document.methods]


def accuracy_against_cost(document: Document) -> str | None:
    """Draws a point with its interval for each method, over the FLOPs of an answer.

    Returns None if there are no answers.
    """
    standings = standings_of(document)
    if not any(standing.flops for standing in standings):
        return None
    figure, axes = _figure()
    draw_accuracy_against_cost(axes, standings, looks([[standing.name for standing in standings]]))
    axes.set_ylabel(f"{accuracy_name(document)} (bars: 95 %)")
    _legend(figure)
    return _svg(figure)


def draw_accuracy_against_cost(
    axes: "Axes", standings: Sequence[Standing], drawn_as: Sequence[Mapping[str, Any]]
) -> None:
    """Draws the points and intervals of all methods with a cost.

    The caller sets the label of the accuracy axis.

    `drawn_as`: `looks` of the standings, in their order.
    """
    costly = [pair for pair in zip(standings, drawn_as, strict=True) if pair[0].flops]
    places = _cost_axis(axes, [standing.flops for standing, _ in costly])
    for (standing, look), place in zip(costly, places, strict=True):
        accuracy = standing.accuracy
        value, low, high = (100 * x for x in (accuracy.value, accuracy.low, accuracy.high))
        axes.errorbar(
            [place],
            [value],
            yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
            linestyle="none",
            capsize=3,
            clip_on=False,
            label=standing.name,
            **look,
        )
    scale = ", logarithmic" if axes.get_xscale() == "log" else ""
    axes.set_xlabel(f"FLOPs per answer{scale}\n(2 · parameters · tokens)")
    axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.25)


def _cost_axis(axes: "Axes", costs: Sequence[float]) -> list[float]:
    """Sets up the cost axis; returns the positions of these costs, with equal ones side by side."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(costs) / _MARGIN, max(costs) * _MARGIN
    ratio = max(costs) / min(costs)
    wide = ratio >= _WIDE
    subs = (1, 2, 5) if ratio >= _DECADE else (1, 2, 3, 5, 7)
    if wide:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(LogLocator(subs=subs) if wide else MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlim(low, high)
    scale = math.log if wide else float
    shares = [(scale(cost) - scale(low)) / (scale(high) - scale(low)) for cost in costs]
    return [low * (high / low) ** share if wide else low + (high - low) * share for share in _apart(shares)]


def _apart(shares: Sequence[float]) -> list[float]:
    """Moves positions on the axis so that all are at least `_APART` from each other, and keeps their order.

    The moves have the least sum of squares: isotonic regression (pool adjacent violators) on the positions
    minus the distances.
    """
    order = sorted(range(len(shares)), key=lambda i: shares[i])
    groups: list[list[float]] = []
    for k, i in enumerate(order):
        groups.append([shares[i] - _APART * k])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    moved = [fmean(group) for group in groups for _ in group]
    places = list(shares)
    for k, i in enumerate(order):
        places[i] = moved[k] + _APART * k
    return places


def looks(evaluations: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Returns the colours and markers of the methods of each evaluation, by name.

    A method has the same colour in all evaluations; each evaluation has one marker. Colours repeat after
    twenty methods.
    """
    names = list(dict.fromkeys(name for methods in evaluations for name in methods))
    return [
        {"color": _COLOURS[names.index(name) % len(_COLOURS)], "marker": _MARKERS[group % len(_MARKERS)]}
        for group, methods in enumerate(evaluations)
        for name in methods
    ]


def risk_against_coverage(document: Document) -> str | None:
    """Draws a line with its band for each method; returns None if no answer has a confidence."""
    standings = standings_of(document)
    if not any(standing.risks for standing in standings):
        return None
    figure, axes = _figure()
    draw_risk_against_coverage(axes, standings, looks([[standing.name for standing in standings]]))
    axes.grid(alpha=0.25)
    _legend(figure)
    return _svg(figure)


def draw_risk_against_coverage(
    axes: "Axes", standings: Sequence[Standing], drawn_as: Sequence[Mapping[str, Any]]
) -> None:
    """Draws the share of wrong answers among the most confident over coverage, with bands of 95 %.

    `drawn_as`: `looks` of the standings, in their order.
    """
    answered = [100 * coverage for coverage in COVERAGES]
    for standing, look in zip(standings, drawn_as, strict=True):
        if standing.risks:
            lows, highs = ([100 * end for end in ends] for ends in zip(*_bands(standing), strict=True))
            values = [100 * risk.value for risk in standing.risks]
            axes.plot(answered, values, markersize=4, label=standing.name, **look)
            axes.fill_between(answered, lows, highs, color=look["color"], alpha=0.12, linewidth=0)
    axes.set_xlabel("coverage: answered, most confident first, %")
    axes.set_ylabel("risk: wrong among them, % (bands: 95 %)")
    axes.set_xlim(0, 103)
    axes.set_ylim(bottom=0)


def _bands(standing: Standing) -> list[tuple[float, float]]:
    return [(risk.low, risk.high) for risk in standing.risks]


def entropy_along_the_answer(document: Document) -> str | None:
    """Draws the mean entropy at each token: dashed before EM, solid after. Returns None without entropies."""
    if all(method.curve is None for method in document.methods):
        return None
    figure, axes = _figure()
    for method, look in zip(document.methods, looks([[m.name for m in document.methods]]), strict=True):
        curve = method.curve
        if curve is None:
            continue
        axes.plot(curve.position, curve.after, color=look["color"], label=method.name)
        if entropy_changed(method.entropy_before, method.entropy_after):
            axes.plot(curve.position, curve.before, color=look["color"], linestyle="--", alpha=0.7)
    axes.set_xlabel("token of the answer")
    axes.set_ylabel("mean entropy, nats")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    _legend(figure)
    return _svg(figure)


def _figure() -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError as why:
        raise BackendError("the report's figures need matplotlib", "pip install 'emlocal[eval]'") from why
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: "Figure") -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)


def _svg(figure: "Figure") -> str:
    """Returns the figure as SVG. Equal figures give equal texts: no date, and ids with a fixed salt."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": "emlocal"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


MOST_SHOWN = 30
"""Maximum number of wins, and of losses, that a comparison lists; the page says how many it leaves out."""
_LONGEST = 6000  # characters of an answer


@dataclass(frozen=True)
class _Side:
    """One method's answers to a problem; the text shown is the first that tells the two methods apart."""

    name: str
    mark: str
    answer: str
    detail: str
    text: str


@dataclass(frozen=True)
class _Pair:
    """A problem that only one method got right, or one got right more often."""

    id: str
    title: str
    question: str
    answer: str
    sides: tuple[_Side, _Side]


@dataclass(frozen=True)
class _Listed:
    """The wins or losses of one method."""

    heading: str
    pairs: Sequence[_Pair]
    left_out: int


def html(document: Document) -> str:
    """Renders the page. Raises BackendError if matplotlib is missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = [
        (
            "Accuracy against cost",
            "Higher is better, further left is cheaper. Methods of nearly equal cost stand side by side.",
            accuracy_against_cost(document),
        ),
        (
            "Entropy along the answer",
            "Entropy before temperature and truncation. Dashed: before EM; solid: after EM.",
            entropy_along_the_answer(document),
        ),
        (
            "Risk against coverage",
            "The share of wrong answers if only the most confident are given. Lower is better. A line that"
            " rises to the right shows that confidence is informative.",
            risk_against_coverage(document),
        ),
    ]
    return environment.get_template("page.html.j2").render(
        document=document,
        columns=texts.columns(document),
        rows=texts.rows(document),
        notes=texts.notes(document),
        difference_columns=texts.DIFFERENCES,
        differences=texts.difference_rows(document),
        pictures=[(title, says, _as_url(svg)) for title, says, svg in pictures if svg is not None],
        lists=_lists(document),
        confidence_columns=texts.confidence_columns(),
        confidences=texts.confidence_rows(document, intervals=True),
        scores=texts.confidence_rows(document, every_score=True),
        confidence_notes=texts.confidence_notes(document),
        facts=texts.facts(document),
    )


def write_page(document: Document, path: Path) -> None:
    """Writes the page. Raises EmlocalError if it cannot be written."""
    with atomic_writer(path) as file:
        file.write(html(document))


def _as_url(svg: str) -> str:
    """Returns the figure as the URL of an image of its own: inline, the ids of two figures would collide."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _lists(document: Document) -> list[_Listed]:
    lists = []
    reference = document.methods[0].name
    right = "right" if document.repetitions == 1 else "right more often"
    for method in document.methods[1:]:
        better, worse = _pairs(document, method.name, reference)
        for found, says in (
            (better, f"{method.name} is {right}, {reference} is not"),
            (worse, f"{reference} is {right}, {method.name} is not"),
        ):
            if found:
                left_out = max(0, len(found) - MOST_SHOWN)
                lists.append(_Listed(f"{says}: {len(found):,}", found[:MOST_SHOWN], left_out))
    return lists


def _pairs(document: Document, name: str, reference: str) -> tuple[list[_Pair], list[_Pair]]:
    """Returns the problems on which a method is better than the reference, and those on which it is worse."""
    ours, theirs = (_by_problem(document.judged[of]) for of in (name, reference))
    better: list[_Pair] = []
    worse: list[_Pair] = []
    for problem in document.task.problems:
        a, b = ours.get(problem.id, []), theirs.get(problem.id, [])
        if not a or not b:
            continue
        share_a, share_b = (sum(one.verdict.right for one in side) / len(side) for side in (a, b))
        if share_a == share_b:
            continue
        wins = share_a > share_b
        sides = _side(name, a, right=wins), _side(reference, b, right=not wins)
        title = " ".join(document.task.title(problem).split())
        answer = "" if document.task.runs_code else problem.answer
        (better if wins else worse).append(_Pair(problem.id, title, problem.question, answer, sides))
    return better, worse


def _by_problem(judged: Sequence[Judged]) -> Mapping[str, list[Judged]]:
    found: dict[str, list[Judged]] = {}
    for one in judged:
        found.setdefault(one.answer.problem.id, []).append(one)
    return found


def _side(name: str, judged: Sequence[Judged], *, right: bool) -> _Side:
    shown = next((one for one in judged if one.verdict.right is right), judged[0])
    many = f", {sum(one.verdict.right for one in judged)} of {len(judged)} right" if len(judged) > 1 else ""
    text = shown.answer.text or shown.answer.error or ""
    cut = text if len(text) <= _LONGEST else text[:_LONGEST] + " […]"
    detail = shown.verdict.detail if shown.verdict.detail not in ("boxed", "program") else ""
    return _Side(name, shown.verdict.mark + many, shown.verdict.answer or "", detail, cut)
