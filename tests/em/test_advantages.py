"""RLOO and GRPO compared with numbers worked by hand."""

import numpy as np
import pytest

from emlocal.em.rewards import grpo, rloo, zero_variance


def test_rloo_by_hand() -> None:
    # means of the others: for 1, (0+0+3)/3 = 1; for 0, 4/3; for 3, 1/3
    assert rloo([[1, 0, 0, 3]])[0] == pytest.approx([0, -4 / 3, -4 / 3, 8 / 3])
    assert rloo([[5, 2]]).tolist() == [[3, -3]]


def test_rloo_is_the_reward_less_the_mean_of_the_others() -> None:
    rewards = np.random.default_rng(1).standard_normal((3, 5))
    for group, found in zip(rewards, rloo(rewards), strict=True):
        for i, got in enumerate(found):
            assert got == pytest.approx(group[i] - np.mean([r for j, r in enumerate(group) if j != i]))


def test_grpo_by_hand() -> None:
    # mean 1, sample variance (0 + 1 + 1 + 4) / 3 = 2
    expected = np.array([0, -1, -1, 2]) / (np.sqrt(2) + 0.1)
    assert grpo([[1, 0, 0, 3]], epsilon=0.1)[0] == pytest.approx(expected)
    assert grpo([[1, 0]])[0] == pytest.approx([np.sqrt(0.5), -np.sqrt(0.5)], rel=1e-5)


def test_groups_do_not_look_at_each_other() -> None:
    rewards = np.random.default_rng(2).standard_normal((4, 6))
    for advantage in (rloo, grpo):
        together = advantage(rewards)
        assert np.array_equal(together[2], advantage(rewards[2:3])[0])
        assert np.abs(together.sum(axis=1)).max() < 1e-12


@pytest.mark.parametrize("value", [0.0, 1.0, -37.123456789, 0.1])  # the mean of three 0.1 is not 0.1
@pytest.mark.parametrize("n", [2, 3, 7])
def test_groups_without_variance_teach_nothing(value: float, n: int) -> None:
    rewards = np.array([[value] * n, list(range(n))])
    assert zero_variance(rewards).tolist() == [True, False]
    for advantages in (rloo(rewards), grpo(rewards), grpo(rewards, epsilon=0.0)):
        assert not advantages[0].any()
        assert advantages[1].any()


def test_rounding_noise_is_not_blown_up() -> None:
    rewards = [[-20.0, -20.0, np.nextafter(-20.0, 0)]]
    assert np.abs(grpo(rewards)).max() < 1e-6


@pytest.mark.parametrize("rewards", [[[1.0]], [1.0, 2.0], [[[1.0, 2.0]]]])
def test_it_takes_groups_of_two_or_more(rewards: object) -> None:
    for advantage in (rloo, grpo):
        with pytest.raises(ValueError, match="two answers"):
            advantage(rewards)
