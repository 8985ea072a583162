"""Reports: equal numbers in all forms, and nothing that a browser would run or fetch."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from emlocal.evaluation.answering import Answer, Judged
from emlocal.evaluation.report import page, texts
from emlocal.evaluation.report.document import Document, as_json, write_json
from emlocal.evaluation.results import Comparison, Estimate, compare, summarize
from emlocal.evaluation.tasks.mathematics import MathTask
from emlocal.evaluation.tasks.task import Mark, Verdict
from tests.evaluation.data import rows

HOSTILE = "<script>alert(1)</script> & \\boxed{1} | pipe\nnext"
MARKS: dict[str, list[Mark]] = {
    "greedy": ["right", "wrong", "wrong", "right", "no answer", "wrong"],
    "em-inf:paper": ["right", "right", "right", "wrong", "right", "wrong"],
}


def judged(task: MathTask, marks: list[Mark], repetition: int = 1, cost: int = 10) -> list[Judged]:
    found = []
    for i, (problem, mark) in enumerate(zip(task.problems, marks, strict=True)):
        row = {
            "text": f"{HOSTILE} {mark} {i}",
            "finish_reason": "stop",
            "prompt_tokens": 100,
            "completion_tokens": cost,
            "forward_passes": cost + 1,
            "elapsed": 0.5,
            "entropies": {"before": [1.0] * (cost + i), "after": [0.25] * (cost + i)},
        }
        verdict = Verdict(mark, None if mark == "no answer" else "1", "boxed")
        found.append(Judged(Answer(problem, repetition, row, {}), verdict))
    return found


@pytest.fixture(scope="module")
def document() -> Document:
    return made(1)


def made(repetitions: int) -> Document:
    task = MathTask("sums", rows(*({"question": f"<b>{i}</b>?", "answer": "1"} for i in range(6))))
    by_name = {}
    for j, (name, marks) in enumerate(MARKS.items()):
        by_name[name] = [
            one
            for k in range(repetitions)
            for one in judged(task, marks[k:] + marks[:k], repetition=k + 1, cost=10 * (j + 1))
        ]
    results = [summarize(task, name, "T 1", found, 10**9, 0) for name, found in by_name.items()]
    return Document(
        task,
        {"name": "tiny", "parameters": 10**9, "sha256": "ab" * 32},
        {"engine": "fake", "seed": 0, "parallel": 2, "stop": []},
        {"emlocal": "0", "commit": None, "packages": {"numpy": "2"}},
        results,
        compare(task, results, 0),
        by_name,
    )


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_numbers_are_those_of_the_answers(document: Document) -> None:
    greedy, paper = document.methods
    assert (greedy.accuracy.value, paper.accuracy.value) == (2 / 6, 4 / 6)
    assert greedy.no_answer == 1
    assert greedy.cost.flops == 2e9 * 110
    assert (paper.entropy_before, paper.entropy_after) == (1.0, 0.25)
    assert paper.curve is not None
    assert set(paper.curve.after) == {0.25}
    (comparison,) = document.comparisons
    assert (comparison.wins, comparison.losses, comparison.p) == (3, 1, 0.625)
    assert comparison.difference.value == pytest.approx(2 / 6)


def test_json_holds_everything_and_reads_back(document: Document, tmp_path: Path) -> None:
    write_json(document, tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(as_json(document)))
    assert found["format"] == "emlocal-eval-1"
    assert found["methods"][1]["accuracy"]["value"] == pytest.approx(4 / 6)
    assert found["comparisons"][0]["p"] == 0.625
    marks = [problem["marks"]["greedy"][0]["mark"] for problem in found["problems"]]
    assert marks == MARKS["greedy"]
    assert (found["model"]["sha256"], found["settings"]["seed"]) == ("ab" * 32, 0)


def test_every_table_has_as_many_cells_as_heads(document: Document) -> None:
    for one in (document, made(3)):
        heads = texts.columns(one)
        assert all(len(row) == len(heads) for row in texts.rows(one))
    assert "mean@3 % (95 %)" in texts.columns(made(3))
    assert {"pass@2 % (95 %)", "pass@3 % (95 %)"} <= set(texts.columns(made(3)))


def test_markdown_tables_are_whole(document: Document) -> None:
    lines = texts.markdown(document).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert any("| greedy | 33.3 (" in line for line in tables)
    assert any("+33.3 (" in line and "0.62" in line for line in tables)
    assert all(line.endswith("|") for line in tables)


def test_the_page_runs_and_fetches_nothing(document: Document) -> None:
    text = page.html(document)
    found = Page(text)
    assert found.open == []
    names = [tag for tag, _ in found.tags]
    assert not {"script", "link", "iframe", "object"} & set(names)
    sources = [attributes["src"] for tag, attributes in found.tags if tag == "img"]
    assert len(sources) == 2
    assert all(source and source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert "&lt;script&gt;alert(1)" in text
    assert "&lt;b&gt;1&lt;/b&gt;?" in text


def test_the_page_shows_wins_and_losses_side_by_side(document: Document) -> None:
    text = page.html(document)
    assert "em-inf:paper is right, greedy is not: 3" in text
    assert "greedy is right, em-inf:paper is not: 1" in text
    assert text.count("<details>") == 4


def test_with_several_answers_a_win_is_more_right_ones() -> None:
    text = page.html(made(3))
    assert "em-inf:paper is right more often, greedy is not" in text
    assert "is right, greedy" not in text


def test_of_a_vote_the_samples_that_were_cut_off_count_not_the_one_that_won() -> None:
    task = MathTask("sums", rows(*({"question": f"{i}?", "answer": "1"} for i in range(6))))
    found = judged(task, ["right"] * 6)
    samples = [{"finish_reason": "stop"}, {"finish_reason": "length"}]
    voted = [
        replace(one, answer=replace(one.answer, row={**one.answer.row, "samples": samples})) for one in found
    ]
    assert summarize(task, "greedy", "T 0", found, 10**9, 0).cut_off == 0
    assert summarize(task, "self-consistency:2", "T 1", voted, 10**9, 0).cut_off == 3


def test_methods_that_are_always_right_or_never_have_an_interval() -> None:
    task = MathTask("sums", rows(*({"question": f"{i}?", "answer": "1"} for i in range(6))))
    for mark, ends in (("right", (0.61, 1.0)), ("wrong", (0.0, 0.39))):
        found = [one for k in (1, 2) for one in judged(task, [mark] * 6, repetition=k, cost=10)]  # type: ignore[list-item]
        result = summarize(task, mark, "T 1", found, 10**9, 0)
        for estimate in (result.accuracy, result.pass_at[2]):
            assert (round(estimate.low, 2), round(estimate.high, 2)) == ends


def test_points_of_the_same_cost_stand_in_its_order() -> None:
    shares = [0.5003, 0.52, 0.5001, 0.5, 0.9]  # the group of three reaches the fourth
    places = page._apart(shares)
    assert sorted(range(5), key=places.__getitem__) == sorted(range(5), key=shares.__getitem__)
    ordered = sorted(places)
    assert min(b - a for a, b in pairwise(ordered)) >= page._APART - 1e-9
    assert places[4] == pytest.approx(0.9)


def test_many_wins_are_cut_and_it_says_so(document: Document, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_SHOWN", 2)
    text = page.html(document)
    assert text.count("<details>") == 3
    assert "… and 1 more" in text


def test_figures_are_the_same_each_time(document: Document) -> None:
    cost = page.accuracy_against_cost(document)
    assert cost is not None
    assert cost == page.accuracy_against_cost(document)
    entropy = page.entropy_along_the_answer(document)
    assert entropy is not None
    assert cost.lstrip().startswith("<?xml")
    assert entropy.count("stroke-dasharray") >= 2  # before EM, for both methods


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (texts.share(Estimate(0.42, 0.365, 0.4771)), "42.0 (36.5–47.7)"),
        (texts.p_value(0.0004), "< 0.001"),
        (texts.p_value(0.0312), "0.031"),
        (texts.p_value(0.625), "0.62"),
        (texts.flops(1.3141e12), "1.31 T"),
        (texts.flops(12.0), "12"),
        (
            texts.difference(Comparison("a", "b", Estimate(-0.031, -0.0691, 0.006), 1, 2, 1, 1)),
            "−3.1 (−6.9 to +0.6)",
        ),
        (texts.difference(Comparison("a", "b", Estimate(0, 0, 0), 0, 0, 1, 1)), "none"),
        (texts.difference(Comparison("a", "b", Estimate(0, -0.1, 0.1), 2, 2, 1, 1)), "0.0 (−10.0 to +10.0)"),
        (texts.difference(None), ""),
    ],
)
def test_numbers_as_people_read_them(found: str, expected: str) -> None:
    assert found == expected
