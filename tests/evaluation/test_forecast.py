"""An evaluation that will take long says so once, from its first answers."""

from pathlib import Path

import pytest

from emlocal.evaluation.forecast import ENOUGH, Forecast, rows_in
from emlocal.text import duration, long_run


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def told(seconds_an_answer: float, at_once: int = 0) -> tuple[list[str], list[tuple[str, int, int]]]:
    """What is said, and what was passed on, of greedy and a vote of 4, 100 questions each."""
    clock, notes, passed = Clock(), list[str](), list[tuple[str, int, int]]()
    forecast = Forecast(
        [("greedy", 100, 1), ("vote:4", 100, 4)],
        lambda what, done, total: passed.append((what, done, total)),
        notes.append,
        clock,
        at_once,
    )
    forecast("greedy", 0, 100)
    for done in range(1, 60):
        clock.now += seconds_an_answer
        forecast("greedy", done, 100)
    return notes, passed


def test_a_long_one_says_so_once() -> None:
    notes, passed = told(5.0)
    assert len(passed) == 60
    # after 4 answers in 20 s, 96 greedy answers and 100 votes of 4 samples are left
    assert notes == [
        "this run may take up to 41 min: 196 answers by 2 methods are left",
        "to shorten it, lower --limit, --max-tokens, or name fewer --methods",
    ]


def test_answers_that_are_begun_are_half_done() -> None:
    notes, _ = told(5.0, at_once=16)
    # 4 answers and half of 16 in 20 s; 496 samples are left, less the half of 16
    assert notes[0].startswith("this run may take up to 14 min: ")


def test_a_short_one_says_nothing() -> None:
    assert told(ENOUGH / 20)[0] == []  # 496 samples of a second


def test_answers_that_are_there_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "greedy.jsonl"
    assert rows_in(path) == 0
    path.write_text('{"custom_id": "a"}\n{"custom_id": "b"}\n')
    assert rows_in(path) == 2


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.4, "7 s"), (99.0, "99 s"), (1500.0, "25 min"), (7200.0, "2.0 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_ten_minutes_are_not_long() -> None:
    assert long_run(600.0, "x", "--y") == []
    assert len(long_run(601.0, "x", "--y")) == 2
