"""The drawn answers, and their statistics."""

import numpy as np
import pytest

from emlocal.backends.fake import END, VOCABULARY, FakeBackend, saying
from emlocal.errors import CancelledError
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.methods.voting import repeated
from emlocal.training.rollouts import Rollout, describe, draw_rollouts
from emlocal.training.settings import FineTuneSettings

SETTINGS = FineTuneSettings(max_tokens=9, seed=3)
PROMPTS = [list(b"[user]%d[assistant]" % i) for i in range(7)]


def backend(**more: object) -> FakeBackend:
    return FakeBackend(sequences=16 + SPARE_SEQUENCES, shared=False, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0),
        ([7], 0),
        ([7, 7, 7, 7], 0),  # one sequence of 4: nothing to repeat
        ([7, 7, 7, 7, 7], 1 / 2),
        ([1, 2, 3, 4, 5, 6, 7, 8], 0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        ([1, 2, 3, 9, 1, 2, 3, 8], 0),  # three in a row are not enough
        ([1, 2] * 50, 95 / 97),
        ([5] * 103, 99 / 100),
    ],
)
def test_repetition_by_hand(tokens: list[int], share: float) -> None:
    assert repeated(tokens) == pytest.approx(share)


def test_answers_do_not_depend_on_how_many_are_drawn_at_once() -> None:
    together = [draw_rollouts(backend(), PROMPTS, SETTINGS, 5, parallel) for parallel in (1, 3, 16)]
    assert together[0] == together[1] == together[2]
    assert [list(r.prompt) for r in together[0]] == PROMPTS
    assert len({r.answer for r in together[0]}) == len(PROMPTS)


def test_draws_are_of_seed_step_and_place() -> None:
    same = [PROMPTS[0]] * 3
    here = draw_rollouts(backend(), same, SETTINGS, 0, 2)
    assert len({r.answer for r in here}) == 3
    assert draw_rollouts(backend(), same[:1], SETTINGS, 0, 2) == here[:1]
    assert draw_rollouts(backend(), same, SETTINGS, 1, 2) != here
    other = FineTuneSettings(max_tokens=9, seed=4)
    assert draw_rollouts(backend(), same, other, 0, 2) != here


def test_an_answer_has_its_end_token_and_a_cut_one_has_none() -> None:
    ended, cut = (
        draw_rollouts(backend(script=saying("yes", sharpness=60)), PROMPTS[:1], settings, 0, 1)[0]
        for settings in (SETTINGS, FineTuneSettings(max_tokens=2))
    )
    assert (ended.answer, ended.ended, ended.text) == ((*b"yes", END), True, "yes")
    assert (cut.answer, cut.ended, cut.text) == (tuple(b"ye"), False, "ye")
    assert len(ended) == len(PROMPTS[0]) + 3  # the end token is predicted and not fed


def test_entropy_is_that_of_the_plain_distribution_at_temperature_1() -> None:
    row = np.zeros(VOCABULARY, dtype=np.float32)
    row[:2] = 9.0
    p = np.exp(row.astype("f8")) / np.exp(row.astype("f8")).sum()
    expected = -(p * np.log(p)).sum()
    settings = FineTuneSettings(max_tokens=4, rollout_temperature=0.5)
    for rollout in draw_rollouts(backend(script=lambda tokens: row), PROMPTS, settings, 0, 4):
        assert rollout.entropy / len(rollout.answer) == pytest.approx(expected, rel=1e-5)


def test_progress_and_cancelling() -> None:
    seen: list[int] = []
    draw_rollouts(backend(), PROMPTS, SETTINGS, 0, 2, progress=seen.append)
    assert seen == list(range(1, 8))
    engine = backend()
    with pytest.raises(CancelledError):
        draw_rollouts(engine, PROMPTS, SETTINGS, 0, 2, cancelled=lambda: True)
    assert draw_rollouts(engine, PROMPTS, SETTINGS, 0, 2)  # no sequence is still held


def test_statistics_weigh_tokens_for_entropy_and_answers_for_the_rest() -> None:
    short = Rollout((1,), (2,), True, "", 3.0)
    long = Rollout((1, 1), (5, 5, 5, 5, 5), False, "", 1.0)
    stats = describe([short, long])
    assert (stats.answers, stats.tokens) == (2, 6)
    assert stats.entropy == pytest.approx(4 / 6)
    assert stats.length == 3
    assert stats.ended == 0.5
    assert stats.repetition == pytest.approx(0.25)
