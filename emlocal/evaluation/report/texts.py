"""Numbers as people read them, for the tables on the screen, in Markdown and in HTML."""

from collections.abc import Sequence
from pathlib import Path

from emlocal.evaluation.confidence import CALIBRATED, CONFIDENCE, ScoreResult
from emlocal.evaluation.report.document import Document
from emlocal.evaluation.results import Comparison, Estimate, MethodResult
from emlocal.evaluation.selective import COVERAGES
from emlocal.files import atomic_writer
from emlocal.text import change, counted

_SCALES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def share(estimate: Estimate) -> str:
    """Formats a share in percent: "42.0 (36.5–47.7)"."""
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"


def difference(comparison: Comparison | None) -> str:
    """Formats a difference in percentage points: "+3.1 (−0.6 to +6.9)"; empty for the reference itself.

    If the methods agree on all problems, resampling gives no interval, and the text is "none".
    """
    if comparison is None:
        return ""
    if comparison.wins + comparison.losses == 0:
        return "none"
    d = comparison.difference
    return f"{_signed(d.value)} ({_signed(d.low)} to {_signed(d.high)})"


def _signed(value: float) -> str:
    text = f"{100 * value:+.1f}"
    return text.replace("-", "−") if float(text) else "0.0"


def p_value(p: float) -> str:
    """Formats a p-value with two or three decimals, or as "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def flops(value: float) -> str:
    """Formats FLOPs: "1.31 T"."""
    for scale, letter in _SCALES:
        if value >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.3g}"


def entropy_changed(before: float, after: float) -> bool:
    """Whether two decimals show that EM changed the entropy."""
    return abs(before - after) >= 0.005


def entropy(before: float, after: float) -> str:
    """Formats entropy in nats: "0.22 → 0.08", or one number if EM changed nothing."""
    return change(before, after, entropy_changed(before, after))


def accuracy_name(document: Document) -> str:
    """Returns the name of the accuracy: "accuracy %", or "mean@4 %"."""
    return "accuracy %" if document.repetitions == 1 else f"mean@{document.repetitions} %"


def columns(document: Document) -> list[str]:
    """Returns the heads of the table of methods."""
    heads = ["method", f"{accuracy_name(document)} (95 %)"]
    heads += [f"pass@{k} % (95 %)" for k in _ks(document)]
    heads += ["problems solved % (95 %)"] if _has_steps(document) else []
    heads += [f"against {document.methods[0].name}", "p (Holm)"] if document.comparisons else []
    heads += ["no answer", "cut off", "read", "written", "passes", "seconds", "FLOPs"]
    return [*heads, "entropy, nats"]


LEGEND = (
    "no answer, cut off: numbers of answers; read and written: tokens; read to FLOPs: means of one answer;"
    " results.md explains more"
)
"""A line below the table of methods on the screen."""


def rows(document: Document) -> list[list[str]]:
    """Returns the rows of the table of methods; costs are means of one answer."""
    compared = {comparison.name: comparison for comparison in document.comparisons}
    return [_row(document, method, compared.get(method.name)) for method in document.methods]


def _row(document: Document, method: MethodResult, comparison: Comparison | None) -> list[str]:
    cells = [method.name, share(method.accuracy)]
    cells += [_pass_at(method, k) for k in _ks(document)]
    if _has_steps(document):
        cells.append("" if method.solved is None else share(method.solved))
    if document.comparisons:
        cells += [difference(comparison), "" if comparison is None else p_value(comparison.p_holm)]
    cost = method.cost
    cells += [f"{method.no_answer:,}", f"{method.cut_off:,}"]
    cells += [f"{cost.read:,.0f}", f"{cost.written:,.0f}", f"{cost.passes:,.0f}"]
    cells += [f"{cost.seconds:.2f}", flops(cost.flops)]
    return [*cells, entropy(method.entropy_before, method.entropy_after)]


def _pass_at(method: MethodResult, k: int) -> str:
    return share(method.pass_at[k]) if k in method.pass_at else ""


def _ks(document: Document) -> list[int]:
    return sorted({k for method in document.methods for k in method.pass_at if k > 1})


def _has_steps(document: Document) -> bool:
    return any(method.solved is not None for method in document.methods)


def confidence_columns(coverages: Sequence[float] = COVERAGES) -> list[str]:
    """Returns the heads of the table of confidence, with the share of wrong answers at each coverage."""
    heads = ["method", "score", "AUROC % (95 %)", "calibration error %"]
    return heads + [f"wrong at {coverage:.0%}".replace("%", " %") for coverage in coverages]


def confidence_rows(
    document: Document,
    coverages: Sequence[float] = COVERAGES,
    *,
    every_score: bool = False,
    intervals: bool = False,
) -> list[list[str]]:
    """Returns the table of confidence, for all scores or for confidence alone.

    It has no rows without confidences.
    """
    rows = []
    for name, results in document.confidence.items():
        for result in results:
            if every_score or result.score in (CONFIDENCE, CALIBRATED):
                rows.append([name, *_score_cells(result, coverages, intervals=intervals)])
    return rows


def _score_cells(result: ScoreResult, coverages: Sequence[float], *, intervals: bool) -> list[str]:
    error = result.calibration_error
    risks = dict(zip(COVERAGES, result.risks, strict=True))
    return [
        result.score,
        "" if result.auroc is None else share(result.auroc),
        "" if error is None else f"{100 * error:.1f}",
        *(share(risks[c]) if intervals else f"{100 * risks[c].value:.1f}" for c in coverages),
    ]


def confidence_notes(document: Document) -> list[str]:
    """Returns the notes below the table of confidence."""
    if not document.confidence:
        return []
    return [
        "AUROC: the chance that a right answer has more confidence than a wrong one; 50 % is a coin toss.",
        "Calibration error: the distance between confidence and the share of right answers, over"
        " ten bins of equally"
        " many answers. Uncalibrated confidence is not meant as such a share.",
        "Wrong at 30 %: the share of wrong answers among the 30 % with the highest confidence. Answers with"
        " the same confidence count as drawn at random. Intervals: bootstrap percentiles over questions.",
    ]


def notes(document: Document) -> list[str]:
    """Returns the notes below the table of methods."""
    n = len(document.task.problems)
    k = document.repetitions
    said = [
        f"{counted(n, 'question')} of {document.task.name} ({document.task.source});"
        f" {counted(k, 'answer')} to each"
        + (" where answers are drawn" if k > 1 else "")
        + f"; seed {document.settings['seed']}.",
        "Intervals: "
        + _kinds_of_intervals(document)
        + ("; for differences, BCa bootstrap over paired questions." if document.comparisons else "."),
    ]
    if _has_steps(document):
        said.append(
            "A problem is solved when all of its steps are right"
            + (" in every answer to it." if k > 1 else ".")
        )
    if document.comparisons:
        test = "McNemar's exact test" if k == 1 else "McNemar's exact test, or a sign-flip test"
        said.append(
            f"p: {test}, adjusted by Holm for {counted(len(document.comparisons), 'comparison')}."
            " A difference whose interval includes 0 may be chance."
        )
    parallel = document.settings["parallel"]
    at_once = "" if parallel is None else f" (with {counted(int(parallel), 'sequence')} at once)"
    said.append(
        "Costs are means per answer and include all samples and rounds of the method: tokens read and"
        f" written, forward passes, seconds{at_once}, FLOPs = 2 · parameters · tokens."
    )
    said.append(
        "No answer: texts in which the judge found nothing to compare. Cut off: answers that reached"
        " --max-tokens or the context; a vote counts by the share of its samples that did."
    )
    guessed = [f"{m.name} {m.guessed:,}" for m in document.methods if m.guessed]
    if guessed:
        said.append(f"Answers without a box, judged by their last number: {', '.join(guessed)}.")
    errors = [f"{m.name} {m.errors:,}" for m in document.methods if m.errors]
    if errors:
        said.append(f"Not answered, because the prompt does not fit the context: {', '.join(errors)}.")
    return said


def _kinds_of_intervals(document: Document) -> str:
    """Names the intervals of the accuracies: for single answers, several to a question, or steps."""
    if _has_steps(document):
        return "BCa bootstrap over problems; Wilson for problems solved"
    if document.repetitions == 1:
        return "Wilson"
    single = any(method.repetitions == 1 for method in document.methods)
    return "BCa bootstrap over questions" + ("; Wilson for methods with one answer to each" if single else "")


def markdown(document: Document) -> str:
    """Returns the evaluation as a Markdown page."""
    heads = columns(document)
    lines = [f"# {document.task.name}: {document.model['name']}", ""]
    lines += markdown_table(heads, rows(document))
    lines += ["", *(f"- {note}" for note in notes(document))]
    if document.confidence:
        lines += ["", "## Confidence", ""]
        lines += markdown_table(confidence_columns(), confidence_rows(document))
        lines += ["", *(f"- {note}" for note in confidence_notes(document))]
    lines += ["", "## Methods", ""]
    lines += markdown_table(["method", "settings"], [[m.name, m.settings] for m in document.methods])
    if document.comparisons:
        lines += ["", "## Differences", ""]
        lines += markdown_table(DIFFERENCES, difference_rows(document))
    lines += ["", "## Made with", ""]
    lines += [f"- {name}: {value}" for name, value in facts(document)]
    return "\n".join(lines) + "\n"


DIFFERENCES = ("method", "against", "points (95 %)", "wins", "losses", "p", "p (Holm)")


def difference_rows(document: Document) -> list[list[str]]:
    """Returns the rows of the table of differences, by `DIFFERENCES`."""
    return [
        [c.name, c.reference, difference(c), f"{c.wins:,}", f"{c.losses:,}", p_value(c.p), p_value(c.p_holm)]
        for c in document.comparisons
    ]


def facts(document: Document) -> list[tuple[str, str]]:
    """Returns model, settings and versions as flat pairs of name and value."""
    groups = (document.model, document.settings, document.made_with, {"judge": document.task.judge})
    flat = [(name, value) for group in groups for name, value in group.items()]
    return [(name, _flat(value)) for name, value in flat if value not in (None, [], {}, "")]


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_flat(inner) for inner in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def markdown_table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

    return [line(heads), "|" + "---|" * len(heads), *map(line, cells)]


def write_markdown(document: Document, path: Path) -> None:
    """Writes the page. Raises EmlocalError if it cannot be written."""
    with atomic_writer(path) as file:
        file.write(markdown(document))
