"""Numbers as people read them, in the tables of the screen, Markdown and HTML."""

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
    """ "42.0 (36.5–47.7)", in percent."""
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"


def difference(comparison: Comparison | None) -> str:
    """ "+3.1 (−0.6 to +6.9)", in points; nothing for the reference itself.

    Where no problem tells the two apart, resampling gives no interval.
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
    """Two digits, or "< 0.001"."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def flops(value: float) -> str:
    """ "1.31 T"."""
    for scale, letter in _SCALES:
        if value >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.3g}"


def entropy_changed(before: float, after: float) -> bool:
    """Whether two digits show that EM did something."""
    return abs(before - after) >= 0.005


def entropy(before: float, after: float) -> str:
    """ "0.22 → 0.08", nats, or one number where EM changed nothing."""
    return change(before, after, entropy_changed(before, after))


def accuracy_name(document: Document) -> str:
    """ "accuracy %", or "mean@4 %"."""
    return "accuracy %" if document.repetitions == 1 else f"mean@{document.repetitions} %"


def columns(document: Document) -> list[str]:
    """The heads of the table of methods."""
    heads = ["method", f"{accuracy_name(document)} (95 %)"]
    heads += [f"pass@{k} % (95 %)" for k in _ks(document)]
    heads += ["problems solved % (95 %)"] if _has_steps(document) else []
    heads += [f"against {document.methods[0].name}", "p (Holm)"] if document.comparisons else []
    heads += ["no answer", "cut off", "read", "written", "passes", "seconds", "FLOPs"]
    return [*heads, "entropy, nats"]


def rows(document: Document) -> list[list[str]]:
    """The table of methods; costs are means of one answer."""
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
    """The heads of the table of confidence: wrong answers among so many of the surest."""
    heads = ["method", "score", "AUROC % (95 %)", "calibration error %"]
    return heads + [f"wrong at {coverage:.0%}".replace("%", " %") for coverage in coverages]


def confidence_rows(
    document: Document,
    coverages: Sequence[float] = COVERAGES,
    *,
    every_score: bool = False,
    intervals: bool = False,
) -> list[list[str]]:
    """The table of confidence, of all scores or of confidence alone; no rows where no answer has any."""
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
    """What a reader of the table of confidence must know."""
    if not document.confidence:
        return []
    return [
        "AUROC: the chance that a right answer has more confidence than a wrong one; 50 is a coin's.",
        "Calibration error: how far confidence is from the share of right answers, over ten bins of equally"
        " many answers. Confidence that is not calibrated is no such share.",
        "Wrong at 30 %: the share of wrong ones among the 30 % of answers with most confidence. Answers of"
        " the same confidence are taken as by lot. Intervals: bootstrap percentiles over questions.",
    ]


def notes(document: Document) -> list[str]:
    """What a reader of the table must know."""
    n = len(document.task.problems)
    k = document.repetitions
    said = [
        f"{counted(n, 'question')} of {document.task.name} ({document.task.source});"
        f" {counted(k, 'answer')} to each"
        + (" where answers are drawn" if k > 1 else "")
        + f"; seed {document.settings['seed']}.",
        "Intervals: "
        + _kinds_of_intervals(document)
        + ("; of differences BCa bootstrap over paired questions." if document.comparisons else "."),
    ]
    if _has_steps(document):
        said.append(
            "A problem is solved when all of its steps are right"
            + (", in all of its answers." if k > 1 else ".")
        )
    if document.comparisons:
        test = "McNemar's exact test" if k == 1 else "McNemar's exact test, or random flips of signs"
        said.append(
            f"p: {test}, adjusted by Holm for {counted(len(document.comparisons), 'comparison')}."
            " A difference whose interval holds 0 may be chance."
        )
    parallel = document.settings["parallel"]
    at_once = "" if parallel is None else f" (with {counted(int(parallel), 'sequence')} at once)"
    said.append(
        "Costs are means of one answer by the method, all its samples and rounds counted: tokens read and"
        f" written, forward passes, seconds{at_once}, FLOPs = 2 · parameters · tokens."
    )
    guessed = [f"{m.name} {m.guessed:,}" for m in document.methods if m.guessed]
    if guessed:
        said.append(f"Without a box, the last number was taken: {', '.join(guessed)}.")
    errors = [f"{m.name} {m.errors:,}" for m in document.methods if m.errors]
    if errors:
        said.append(f"Not asked, because the prompt does not fit the context: {', '.join(errors)}.")
    return said


def _kinds_of_intervals(document: Document) -> str:
    """Which apply to the accuracies: of single answers, of several to a question, of steps."""
    if _has_steps(document):
        return "BCa bootstrap over problems; of problems solved Wilson's"
    if document.repetitions == 1:
        return "Wilson's"
    single = any(method.repetitions == 1 for method in document.methods)
    return "BCa bootstrap over questions" + (
        "; Wilson's of methods with one answer to each" if single else ""
    )


def markdown(document: Document) -> str:
    """The evaluation as a page of Markdown."""
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
    """The table of differences, by `DIFFERENCES`."""
    return [
        [c.name, c.reference, difference(c), f"{c.wins:,}", f"{c.losses:,}", p_value(c.p), p_value(c.p_holm)]
        for c in document.comparisons
    ]


def facts(document: Document) -> list[tuple[str, str]]:
    """Model, settings and versions, flat."""
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
    """The lines of a table in Markdown."""

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

    return [line(heads), "|" + "---|" * len(heads), *map(line, cells)]


def write_markdown(document: Document, path: Path) -> None:
    """Write the page. Raises EmlocalError where it cannot be written."""
    with atomic_writer(path) as file:
        file.write(markdown(document))
