"""Plots of runs: reading, telling runs apart, drawing, and refusals."""

import json
from pathlib import Path

import pytest

from emlocal.errors import EmlocalError, UsageError
from emlocal.plotting import write_picture
from emlocal.plotting.runs import PANELS, panels_of, read_runs
from tests.plotting.data import rows, run, texts


def test_a_panel_for_each_thing_that_was_measured_and_a_line_for_each_run(tmp_path: Path) -> None:
    ft, rl = run(tmp_path / "ft", rows()), run(tmp_path / "_rl", rows(reward=-3.0))
    write_picture([ft], tmp_path / "ft.svg")
    write_picture([ft / "metrics.jsonl", rl], tmp_path / "both.svg")
    assert {"Entropy of answers", "Length of answers", "ft"} <= texts(tmp_path / "ft.svg")
    assert not {"Reward", "KL to the base model"} & texts(tmp_path / "ft.svg")
    assert {"Reward", "ft", "_rl"} <= texts(tmp_path / "both.svg")


def test_numbers_are_where_their_steps_are(tmp_path: Path) -> None:
    measured = rows()
    measured[2]["kl"] = 0.5
    (found,) = read_runs([run(tmp_path / "a", measured)])
    by_name = {panel.name: found.line(panel) for panel in PANELS}
    assert by_name["entropy"] == ([0, 1, 2, 3], [1.0, 1 / 2, 1 / 3, 1 / 4])
    assert by_name["kl"] == ([2], [0.5])
    assert by_name["repetition"][1] == [10.0] * 4
    assert by_name["reward"] == ([], [])


@pytest.mark.parametrize(
    ("reward", "unit"),
    [
        ([["token", 1.0]], "nats"),
        ([["verifier", 1.0]], "share"),
        ([["verifier", 1.0], ["token", 0.1]], "weighted sum"),
        ("broken", ""),
    ],
)
def test_rewards_share_a_panel_with_those_of_their_unit(tmp_path: Path, reward: object, unit: str) -> None:
    folder, other = run(tmp_path / "a", rows(reward=0.5)), run(tmp_path / "b", rows(reward=0.7))
    (folder / "run.json").write_text(json.dumps({"settings": {"reward": reward}}))
    found = read_runs([folder, other])
    assert [each.reward for each in found] == [unit, ""]
    lines = [found[0].line(panel)[1] for panel in PANELS if panel.name == "reward"]
    assert sorted(lines) == [[], [], [], [0.5] * 4]
    write_picture([folder, other], tmp_path / "run.svg")
    assert not unit or unit in texts(tmp_path / "run.svg")


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    folders = [run(tmp_path / a / "out", rows()) for a in ("one", "two")]
    assert [found.label for found in read_runs(folders)] == ["one/out", "two/out"]
    assert [found.label for found in read_runs(folders[:1])] == ["out"]
    with pytest.raises(UsageError, match="given twice"):
        read_runs([folders[0], tmp_path / "one" / ".." / "one" / "out"])


def test_a_run_that_is_being_written(tmp_path: Path) -> None:
    (found,) = read_runs([run(tmp_path / "a", rows(2), end='{"step": 2, "entr')])
    assert len(found.rows) == 2


def test_a_picture_replaces_the_old_one_whole(tmp_path: Path) -> None:
    picture = tmp_path / "run.PNG"
    picture.write_bytes(b"old")
    write_picture([run(tmp_path / "a", rows(1))], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "run.PNG"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no metrics yet"),
        ("[1]\n", "no metrics of a run"),
        ('{"a": 1}\n', "no metrics of a run"),
        ("\x7fELF\x00", "line 1 is not JSON"),
        ('{"step": 0}\n{"ste\n{"step": 2}\n', "line 2 is not JSON"),
    ],
)
def test_what_is_no_run(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_runs([run(tmp_path / "a", [], end=text)])


def test_what_is_not_there_and_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run: it has no metrics\.jsonl"):
        read_runs([tmp_path / "none"])
    found = run(tmp_path / "a", rows())
    with pytest.raises(UsageError, match=r"is not a picture"):
        write_picture([found], tmp_path / "run.gif")
    with pytest.raises(EmlocalError, match="cannot write"):
        write_picture([found], tmp_path / "none" / "run.png")


def test_what_is_no_number_has_no_place(tmp_path: Path) -> None:
    odd = [
        {"step": 0, "entropy": float("nan")},
        {"step": 1, "entropy": True},
        {"step": 2, "entropy": 10**400},
    ]
    found = read_runs([run(tmp_path / "a", [*odd, {"step": 3, "entropy": 0.5}])])
    assert found[0].line(PANELS[0]) == ([3], [0.5])
    with pytest.raises(UsageError, match="no number to plot"):
        panels_of(read_runs([run(tmp_path / "b", odd)]))
