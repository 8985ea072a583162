"""Evaluations: the figures of results.json, on the terminal and in a picture."""

from pathlib import Path

import pytest

from emlocal.errors import UsageError
from emlocal.evaluation.report.page import looks
from emlocal.plotting import screen_lines, write_picture
from emlocal.plotting.evaluations import accuracy_name, read_evaluations
from tests.plotting.data import evaluation, texts


def shown(*paths: Path, width: int = 80) -> list[str]:
    return [line.plain for line in screen_lines(paths, width, colours=False)]


def test_bars_have_the_accuracy_and_its_interval(tmp_path: Path) -> None:
    heading, unit, greedy, em, axis, ends, cost, *bars = shown(evaluation(tmp_path / "e"))
    assert heading == "sums, 6 problems, tiny"
    assert unit.startswith("accuracy %")
    for line, name, figures in (
        (greedy, "greedy", "33.3 (9.7–70.0)"),
        (em, "em-inf:paper", "66.7 (30.0–90.3)"),
    ):
        assert line.split()[0] == name
        assert line.endswith(figures)
        assert max(map(len, (axis, line))) <= 80
        assert line.index("├") < line.index("●") < line.index("┤")
    assert greedy.index("●") < em.index("●")
    start, columns = axis.index("└"), len(axis) - axis.index("└")
    assert (greedy.index("●") - start) / columns == pytest.approx(1 / 3, abs=1 / columns)
    assert ends.split() == ["0", "100", "%"]
    assert "FLOPs" in cost
    assert [bar.split()[0] for bar in bars] == ["greedy", "em-inf:paper"]
    assert bars[0].count("█") < bars[1].count("█")


def test_a_narrow_terminal_has_names_above_their_bars(tmp_path: Path) -> None:
    lines = shown(evaluation(tmp_path / "e"), width=34)
    assert "em-inf:paper" in lines
    assert max(len(line) for line in lines if "█" in line) <= 34


def test_several_evaluations_have_headings_and_one_axis(tmp_path: Path) -> None:
    one, two = evaluation(tmp_path / "one"), evaluation(tmp_path / "two", 2)
    lines = shown(one, two / "results.json")
    assert [line for line in lines if "problems" in line] == [
        "one: sums, 6 problems, tiny",
        "two: sums, 6 problems, tiny",
    ]
    assert sum(line.startswith("mean@2 %") for line in lines) == 1
    assert len({line.index("└") for line in lines if "└" in line}) == 1
    found = read_evaluations([one / "results.json", two / "results.json"])
    assert [accuracy_name([each]) for each in found] == ["accuracy", "mean@2"]
    assert accuracy_name(found) == "accuracy"


def test_pictures(tmp_path: Path) -> None:
    one, two = evaluation(tmp_path / "one"), evaluation(tmp_path / "two", 2)
    write_picture([one], tmp_path / "one.svg")
    found = texts(tmp_path / "one.svg")
    assert {"Accuracy, with 95 % intervals", "Accuracy against cost", "sums, 6 problems, tiny"} <= found
    assert {"greedy", "33.3 (9.7–70.0)", "em-inf:paper"} <= found
    write_picture([one, two], tmp_path / "both.svg")
    assert {"one", "two"} <= texts(tmp_path / "both.svg")


def test_a_method_has_one_colour_and_an_evaluation_one_marker() -> None:
    methods = ["greedy", *(f"em-inf:em_steps={n}" for n in range(13))]
    found = looks([methods, ["em-inf:em_steps=2", "greedy"]])
    assert len({look["color"] for look in found[:14]}) == 14
    assert [look["color"] for look in found[14:]] == [found[3]["color"], found[0]["color"]]
    assert {look["marker"] for look in found[:14]} != {look["marker"] for look in found[14:]}
    assert len({(look["color"], look["marker"]) for look in found}) == 16


def test_an_evaluation_given_twice(tmp_path: Path) -> None:
    one = evaluation(tmp_path / "one")
    with pytest.raises(UsageError, match="an evaluation is given twice"):
        shown(one, one / "results.json")
