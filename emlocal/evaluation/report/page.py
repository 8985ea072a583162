"""The HTML page: everything in one file, no scripts, nothing fetched."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from emlocal.evaluation.answering import Judged
from emlocal.evaluation.report import figures, texts
from emlocal.evaluation.report.document import Document
from emlocal.files import atomic_writer

MOST_SHOWN = 30
"""Wins of a comparison that are shown, and losses; the page says how many are left out."""
_LONGEST = 6000  # characters of an answer


@dataclass(frozen=True)
class _Side:
    """One method's answers to a problem, the first that tells the two methods apart in front."""

    name: str
    mark: str
    answer: str
    detail: str
    text: str


@dataclass(frozen=True)
class _Pair:
    """A problem that one method alone got right, or more often."""

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
    """The page. Raises BackendError where matplotlib is missing."""
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
            "Up is better, left is cheaper. Methods of nearly the same cost are drawn side by side.",
            figures.accuracy_against_cost(document),
        ),
        (
            "Entropy along the answer",
            "Of the distribution before temperature and truncation. Dashed: before EM; solid: after it.",
            figures.entropy_along_the_answer(document),
        ),
        (
            "Risk against coverage",
            "How many of the answers are wrong where only the surest are given. Lower is better; a line that"
            " rises to the right is of a confidence that knows something.",
            figures.risk_against_coverage(document),
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
    """Write the page. Raises EmlocalError where it cannot be written."""
    with atomic_writer(path) as file:
        file.write(html(document))


def _as_url(svg: str) -> str:
    """As an image of its own: the ids of two figures in one page would be mistaken for each other."""
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
    """The problems on which a method is better than the reference, and those on which it is worse."""
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
