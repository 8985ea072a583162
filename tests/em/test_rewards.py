"""Rewards compared with numbers worked by hand and with naive loops."""

import numpy as np
import pytest

from emlocal.em.rewards import (
    majority_reward,
    self_certainty,
    self_certainty_reward,
    sequence_reward,
    token_reward,
    verifier_reward,
    vote_reward,
    weighted_sum,
)
from emlocal.errors import LogitsError

PER_TOKEN = [0.5, 1.0, 0.25, 2.0, 1.0, 0.0]
LENGTHS = [3, 1, 2]


def test_the_papers_rewards_are_sums_and_the_released_codes_means() -> None:
    assert token_reward(PER_TOKEN, LENGTHS).tolist() == [-1.75, -2.0, -1.0]
    assert token_reward(PER_TOKEN, LENGTHS, "mean").tolist() == [-1.75 / 3, -2.0, -0.5]
    assert sequence_reward([-x for x in PER_TOKEN], LENGTHS).tolist() == [-1.75, -2.0, -1.0]
    assert sequence_reward([-x for x in PER_TOKEN], LENGTHS, "mean").tolist() == [-1.75 / 3, -2.0, -0.5]
    assert self_certainty_reward(PER_TOKEN, LENGTHS).tolist() == [1.75 / 3, 2.0, 0.5]


def test_under_the_mean_certain_padding_pays_and_under_the_sum_it_does_not() -> None:
    short, padded = [1.0, 1.0], [1.0, 1.0, 0.1, 0.1]
    by_sum = token_reward(short + padded, [2, 4])
    by_mean = token_reward(short + padded, [2, 4], "mean")
    assert by_sum[1] < by_sum[0]
    assert by_mean[1] > by_mean[0]


@pytest.mark.parametrize("lengths", [[3, 3, 1], [6, 0], [2, 2], [[3, 3]], [7, -1]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not divide 6 tokens"):
        token_reward(PER_TOKEN, lengths)


def test_no_answers_have_no_rewards() -> None:
    assert token_reward([], []).shape == (0,)
    assert majority_reward([]).shape == (0,)
    assert vote_reward([]).shape == (0,)


def test_self_certainty_is_the_divergence_of_the_uniform_from_the_model() -> None:
    rows = 3 * np.random.default_rng(2).standard_normal((6, 40))
    p = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
    expected = [sum(1 / 40 * np.log(1 / 40 / p[i, v]) for v in range(40)) for i in range(6)]
    assert self_certainty(rows) == pytest.approx(expected, abs=1e-12)
    without_log_v = np.log(np.exp(rows).sum(axis=1)) - rows.mean(axis=1)  # as in Intuitor's code
    assert without_log_v - np.log(40) == pytest.approx(expected, abs=1e-12)


def test_self_certainty_is_zero_of_flat_rows_and_grows_with_sharpness() -> None:
    assert self_certainty(np.full((2, 300), 7.0)).tolist() == [0.0, 0.0]
    row = np.random.default_rng(0).standard_normal((1, 30))
    assert self_certainty(2 * row) > self_certainty(row)


def test_self_certainty_refuses_masked_tokens() -> None:
    with pytest.raises(LogitsError, match="masked"):
        self_certainty([[0.0, -np.inf, 1.0]])


@pytest.mark.parametrize(
    ("answers", "shares", "votes"),
    [
        (["a", "b", "a", None], [0.5, 0.25, 0.5, 0.25], [1, 0, 1, 0]),
        ([None, None, None, "z"], [0.25, 0.25, 0.25, 0.25], [0, 0, 0, 1]),
        (["b", "a", "a", "b"], [0.5, 0.5, 0.5, 0.5], [1, 0, 0, 1]),  # the earliest of a tie
        ([None, None], [0.5, 0.5], [0, 0]),
        (["a", "a"], [1, 1], [1, 1]),
        ([0, None, 0.0], [2 / 3, 1 / 3, 2 / 3], [1, 0, 1]),  # falsy keys are answers too
    ],
)
def test_the_majority(answers: list[str | None], shares: list[float], votes: list[float]) -> None:
    assert majority_reward(answers) == pytest.approx(shares)
    assert vote_reward(answers).tolist() == votes


def test_the_verifier() -> None:
    assert verifier_reward(["18", None, "17", "18"], "18").tolist() == [1, 0, 0, 1]
    assert verifier_reward([None, 0], 0).tolist() == [0, 1]
    assert verifier_reward([None], None).tolist() == [0]  # no answer matches an unreadable label


def test_weighted_sums() -> None:
    assert weighted_sum([[1.0, 0.0], [-20.0, -30.0]], [1.0, 0.1]).tolist() == [-1.0, -3.0]
    assert weighted_sum([[[1.0], [2.0]]], [2.0]).tolist() == [[2.0], [4.0]]


@pytest.mark.parametrize(
    ("rewards", "weights"), [([], []), ([[1.0]], [1.0, 2.0]), ([[1.0], [1.0, 2.0]], [1.0, 1.0])]
)
def test_weighted_sums_of_what_does_not_match(rewards: list[list[float]], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        weighted_sum(rewards, weights)
