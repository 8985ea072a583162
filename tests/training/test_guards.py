"""Each guard on histories made by hand: when it fires, and that it does not fire early."""

from dataclasses import replace

import pytest

from emlocal.training.rollouts import WINDOW, Guards, RolloutStats
from emlocal.training.settings import FineTuneSettings

WELL = RolloutStats(answers=4, tokens=400, entropy=0.5, length=100, ended=1.0, repetition=0.05)
SETTINGS = FineTuneSettings()


def looked(
    steps: list[RolloutStats], settings: FineTuneSettings = SETTINGS
) -> tuple[Guards, list[str | None]]:
    guards = Guards(settings)
    return guards, [guards.look(step) for step in steps]


def test_a_run_that_is_well_goes_on() -> None:
    falling = [replace(WELL, entropy=0.5 - 0.01 * i, length=100 - i) for i in range(45)]
    assert looked(falling)[1] == [None] * 45


def test_the_entropy_floor_is_that_of_a_window() -> None:
    dip = [WELL, WELL, replace(WELL, entropy=0.001), WELL, WELL]
    assert looked(dip)[1] == [None] * 5
    guards, said = looked([WELL, *[replace(WELL, entropy=0.019)] * 3])
    assert said[:3] == [None] * 3
    assert said[3] == "the answers' entropy is 0.019 nats per token, below --entropy-floor 0.02"
    assert not guards.sound
    assert looked([replace(WELL, entropy=0.02)] * 5)[1] == [None] * 5


def test_repetition_is_compared_with_the_first_step() -> None:
    looping = replace(WELL, repetition=0.3)
    assert looked([looping] * 10)[1] == [None] * 10  # they already looped at first
    said = looked([WELL] * 3 + [looping] * 3)[1]
    assert said[:5] == [None] * 5  # means of 0.13 and 0.22 are at most 0.2 above 0.05
    assert said[5] == "30% of the answers' text is repeated, 5% at first (--max-repetition 0.2)"


@pytest.mark.parametrize(("length", "words"), [(201, "201 tokens, 100 at first"), (49, "49 tokens, 100 at")])
def test_length_by_a_factor_either_way(length: float, words: str) -> None:
    other = replace(WELL, length=length)
    said = looked([WELL] * 3 + [other] * 3)[1]
    assert said[:5] == [None] * 5
    assert said[5] is not None
    assert words in said[5]
    limit = replace(WELL, length=200 if length > 100 else 50)
    assert looked([WELL] * 3 + [limit] * 5)[1] == [None] * 8


@pytest.mark.parametrize(
    ("other", "stops_at"),
    [
        (replace(WELL, length=1000), 1),  # 550 on average
        (replace(WELL, length=300), 2),  # 200, then 233
        (replace(WELL, length=20), 2),  # 60, then 47
        (replace(WELL, repetition=0.55), 1),
        (replace(WELL, repetition=0.3), 3),
    ],
)
def test_a_collapse_in_the_first_update_is_no_standard_for_later_ones(
    other: RolloutStats, stops_at: int
) -> None:
    guards = Guards(SETTINGS)
    assert guards.look(WELL) is None
    for step in range(1, stops_at + 1):
        why = guards.look(other)
        assert not guards.sound
        assert (why is not None) == (step == stops_at)


def test_growth_that_doubles_step_by_step_stops() -> None:
    said = looked([replace(WELL, length=length) for length in (60, 120, 240, 256, 256)])[1]
    assert said[:2] == [None, None]
    assert said[2] is not None  # 140 on average


def test_kl_of_a_window_and_of_the_step_itself() -> None:
    guards = Guards(SETTINGS)
    kls = [0.0, 0.5, 1.2, 1.2, 1.2]
    said = []
    for kl in kls:
        assert guards.look(WELL) is None
        said.append(guards.look_at_kl(kl))
        assert guards.sound == (kl <= 1)
    assert said[:3] == [None] * 3  # means of 0, 0.25, 0.57
    assert said[3] is None  # 0.97
    assert said[4] == "the KL to the base is 1.20 nats per token, above --max-kl 1"


def test_a_kl_that_is_not_looked_at() -> None:
    guards = Guards(replace(SETTINGS, max_kl=0))
    guards.look(WELL)
    assert guards.look_at_kl(50.0) is None
    assert guards.sound


def test_one_step_can_be_unsound_in_a_run_that_goes_on() -> None:
    guards, said = looked([WELL, WELL, replace(WELL, entropy=0.001)])
    assert said == [None] * 3
    assert not guards.sound
    guards.look(WELL)
    assert guards.sound


def test_the_first_step_can_collapse() -> None:
    assert looked([replace(WELL, entropy=0.01)])[1][0] is not None
    assert looked([replace(WELL, length=1, repetition=0.9)])[1] == [None]  # as it always was


def test_history_is_all_that_is_remembered() -> None:
    steps = [replace(WELL, length=100 + 30 * i) for i in range(8)]
    whole, said = looked(steps)
    first, _ = looked(steps[:4])
    again = Guards(SETTINGS, list(first.history))
    assert [again.look(step) for step in steps[4:]] == said[4:]
    assert again.history == whole.history
    assert WINDOW == 3
