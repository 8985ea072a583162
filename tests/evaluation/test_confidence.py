"""The figures of confidence: from rows to results.json, pages and plots."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emlocal.em.scores import RANKED, scores
from emlocal.errors import UsageError
from emlocal.evaluation.answering import Answer, Judged
from emlocal.evaluation.confidence import CALIBRATED, CONFIDENCE, Cases, score_results
from emlocal.evaluation.report import page, texts
from emlocal.evaluation.report.document import Document, read_results, write_json
from emlocal.evaluation.results import compare, summarize
from emlocal.evaluation.selective import COVERAGES, auroc, calibration_error, risks
from emlocal.evaluation.tasks.mathematics import MathTask
from emlocal.evaluation.tasks.task import Verdict
from emlocal.methods.confidence import FREE, METHOD, Calibration, Platt, Subject
from emlocal.plotting import screen_lines, write_picture
from tests.evaluation.data import rows

N = 12
SURE = [0.05 + 0.9 * i / N for i in range(N)]
RIGHT = [i in (3, 6, 7, 9, 10, 11) for i in range(N)]


def judged(
    sure: Sequence[float], right: Sequence[bool], source: str = METHOD, without: Sequence[int] = ()
) -> list[Judged]:
    """Makes judged answers; `without`: those whose rows have no scores, as earlier versions wrote them."""
    task, found = sums(), []
    for i, (p, y) in enumerate(zip(sure, right, strict=True)):
        row: dict[str, Any] = {
            "text": "1", "finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 2,
            "forward_passes": 3, "elapsed": 0.1,
            "scores": scores([1 - p, 1.0], [p, 0.5]).as_json(),
            "confidence": p, "confidence_from": source, "calibrated": False,
        }  # fmt: skip
        if i in without:
            row = {name: v for name, v in row.items() if name not in ("scores", "confidence")}
        verdict = Verdict("right" if y else "wrong", "1", "boxed")
        found.append(Judged(Answer(task.problems[i], 1, row, {}), verdict))
    return found


def sums() -> MathTask:
    return MathTask("sums", rows(*({"question": f"{i}?", "answer": "1"} for i in range(N))))


def cases(*args: Any, **more: Any) -> Cases:
    found = judged(*args, **more)
    return Cases.of(found, [one.answer.problem.id for one in found])


def test_figures_are_those_of_the_rows() -> None:
    found = {one.score: one for one in score_results(cases(SURE, RIGHT), 0)}
    assert found.keys() == {CONFIDENCE, *RANKED}
    sure = found[CONFIDENCE]
    assert sure.answers == N
    assert sure.auroc is not None
    assert sure.auroc.value == auroc(SURE, RIGHT)
    assert sure.auroc.low < sure.auroc.value < sure.auroc.high
    assert sure.calibration_error == calibration_error(SURE, RIGHT)
    assert tuple(risk.value for risk in sure.risks) == risks(SURE, RIGHT)
    assert found["mean-entropy"].risks == sure.risks  # the order is the same
    assert found["mean-entropy"].calibration_error is None


def test_rows_without_scores_do_not_count() -> None:
    some = cases(SURE, RIGHT, without=(0, 3))
    assert len(some.right) == N - 2
    assert score_results(cases(SURE, RIGHT, without=range(N)), 0) == []


def test_where_a_method_has_its_own_confidence_others_do_not_count() -> None:
    own, free = judged(SURE[:6], RIGHT[:6]), judged(SURE, RIGHT, FREE)[6:]
    mixed = Cases.of([*own, *free], [str(i) for i in range(N)])
    assert mixed.own
    assert list(mixed.confidence) == SURE[:6]
    assert not cases(SURE, RIGHT, FREE).own


def test_a_calibration_has_a_line_of_its_own() -> None:
    made = Calibration(Subject("m", "vote", 8, ""), METHOD, Platt(8.0, -4.0, 0.02, 0.98))
    found = {one.score: one for one in score_results(cases(SURE, RIGHT), 0, made)}
    assert found[CALIBRATED].calibration_error == calibration_error([made.curve(p) for p in SURE], RIGHT)
    assert found[CALIBRATED].risks == found[CONFIDENCE].risks
    names = [one.score for one in score_results(cases(SURE, RIGHT, FREE), 0, made)]
    assert CALIBRATED not in names  # its score is one that these rows lack


@pytest.fixture(scope="module")
def document() -> Document:
    task, by_name = sums(), {"vote": judged(SURE, RIGHT), "old": judged(SURE, RIGHT, without=range(N))}
    results = [summarize(task, name, "", found, 10**9, 0) for name, found in by_name.items()]
    return Document(
        task,
        {"name": "tiny"},
        {"engine": "fake", "seed": 0, "parallel": 2},
        {"emlocal": "0"},
        results,
        compare(task, results, 0),
        by_name,
        {"vote": score_results(cases(SURE, RIGHT), 0)},
    )


def test_results_json_has_them_and_gives_the_risks_back(document: Document, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(document, path)
    vote, old = json.loads(path.read_text())["methods"]
    assert [one["score"] for one in vote["scores"]] == [CONFIDENCE, *RANKED]
    assert old["scores"] == []
    standings = {one.name: one for one in read_results(path).standings}
    assert standings["vote"].risks == document.confidence["vote"][0].risks
    assert standings["old"].risks == ()


@pytest.mark.parametrize("risks", [None, [], [{"value": 2, "low": 0, "high": 1}] * 10, [3] * 10])
def test_damaged_risks_are_refused(document: Document, tmp_path: Path, risks: object) -> None:
    path = tmp_path / "results.json"
    write_json(document, path)
    value = json.loads(path.read_text())
    value["methods"][0]["scores"][0]["risks"] = risks
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError, match="is damaged"):
        read_results(path)


def test_results_of_earlier_versions_have_no_risks(document: Document, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(document, path)
    value = json.loads(path.read_text())
    for method in value["methods"]:
        del method["scores"]
    path.write_text(json.dumps(value))
    assert all(one.risks == () for one in read_results(path).standings)


def test_pages_have_the_table_the_figure_and_all_scores(document: Document) -> None:
    markdown = texts.markdown(document)
    table = markdown[markdown.index("## Confidence") : markdown.index("## Methods")]
    (line,) = (line for line in table.splitlines() if line.startswith("| vote"))
    value = [f"{100 * risk:.1f}" for risk in risks(SURE, RIGHT)]
    assert [cell.strip() for cell in line.split("|")][-11:-1] == value
    html = page.html(document)
    assert html.count("<img") == 2  # cost and risk; there are no entropies
    assert "Risk against coverage" in html
    assert all(f"<td>{name}</td>" in html for name in (CONFIDENCE, *RANKED))
    without = page.html(replace(document, confidence={}))
    assert "Risk against coverage" not in without
    assert "Confidence" not in without


@pytest.mark.parametrize(("width", "shown"), [(80, COVERAGES), (64, COVERAGES[1::2]), (30, COVERAGES[4::5])])
def test_the_terminal_shows_as_many_coverages_as_it_has_room_for(
    document: Document, tmp_path: Path, width: int, shown: Sequence[float]
) -> None:
    write_json(document, tmp_path / "results.json")
    lines = [line.plain for line in screen_lines([tmp_path], width, colours=False)]
    start = lines.index("wrong %, most confident answers first")
    heads = [part.strip() for part in lines[start + 1].split("%")[:-1]]
    assert heads == [f"{100 * coverage:.0f}" for coverage in shown]
    expected = [f"{100 * risks(SURE, RIGHT)[COVERAGES.index(c)]:.1f}" for c in shown]
    assert lines[start + 2].split()[1:] == expected
    assert all(len(line) <= width for line in lines[start + 1 : start + 3])


def test_a_picture_has_the_third_panel(document: Document, tmp_path: Path) -> None:
    write_json(document, tmp_path / "results.json")
    write_picture([tmp_path], tmp_path / "with.svg")
    write_json(replace(document, confidence={}), tmp_path / "results.json")
    write_picture([tmp_path], tmp_path / "without.svg")
    panels = [(tmp_path / f"{name}.svg").read_text().count('id="axes_') for name in ("with", "without")]
    assert panels == [3, 2]
