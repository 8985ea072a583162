"""The mean of EM-RL's estimates over every answer of an enumerable model, compared with the slope."""

import numpy as np
import pytest

from emlocal.em.entropy import log_softmax
from emlocal.em.losses import PolicyObjective, averaging_weights, em_ft, k3, log_prob_gradient, policy_loss
from emlocal.em.rewards import (
    Float64,
    grpo,
    majority_reward,
    rloo,
    self_certainty_reward,
    sequence_reward,
    token_reward,
    verifier_reward,
    vote_reward,
    weighted_sum,
)
from tests.em import tiny_policy as tiny

THETA = tiny.table()
LENGTHS = [tiny.LENGTH] * tiny.COUNT
LAST = [int(token) for token in tiny.ANSWERS[:, -1]]
"""Stands for the extracted answer: the last token."""
EXACT = 1e-9
PAIRS = tiny.all_groups(2)


def flat(numbers: Float64) -> Float64:
    return numbers.reshape(-1)


REWARDS = {
    "token": token_reward(flat(tiny.entropies(THETA)), LENGTHS),
    "token, mean": token_reward(flat(tiny.entropies(THETA)), LENGTHS, "mean"),
    "sequence": sequence_reward(flat(tiny.log_probs(THETA)), LENGTHS),
    "sequence, mean": sequence_reward(flat(tiny.log_probs(THETA)), LENGTHS, "mean"),
    "self-certainty": self_certainty_reward(flat(tiny.certainties(THETA)), LENGTHS),
    "verifier": verifier_reward(LAST, 3),
    "vote of others": vote_reward([2, 2, 2, *LAST])[3:],  # as in TTRL: the label comes from other answers
}
REWARDS["verifier + 0.1 token"] = weighted_sum([REWARDS["verifier"], REWARDS["token"]], [1.0, 0.1])


def same(got: Float64, want: Float64) -> None:
    assert np.abs(want).max() > 1e-3  # otherwise there is nothing to compare
    assert np.abs(got - want).max() <= EXACT


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("loss", ["reinforce", "ppo-clip"])
def test_without_a_baseline_the_mean_estimate_is_the_gradient(reward: str, loss: str) -> None:
    singles = np.arange(tiny.COUNT)[:, None]
    rewards = REWARDS[reward]
    objective = PolicyObjective("reinforce" if loss == "reinforce" else "ppo-clip")
    got = tiny.expected_estimate(THETA, singles, rewards[singles], objective)
    same(got, tiny.exact_gradient(THETA, rewards))


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("loss", ["reinforce", "ppo-clip"])
def test_rloo_is_unbiased_over_all_pairs(reward: str, loss: str) -> None:
    rewards = REWARDS[reward]
    objective = PolicyObjective("reinforce" if loss == "reinforce" else "ppo-clip")
    got = tiny.expected_estimate(THETA, PAIRS, rloo(rewards[PAIRS]), objective)
    same(got, tiny.exact_gradient(THETA, rewards))


@pytest.mark.parametrize("reward", REWARDS)
def test_grpo_of_pairs_climbs_the_probability_of_winning_and_not_the_reward(reward: str) -> None:
    rewards = REWARDS[reward]
    got = tiny.expected_estimate(THETA, PAIRS, grpo(rewards[PAIRS], epsilon=0.0))
    wins = np.sign(rewards[:, None] - rewards[None, :]) @ tiny.probabilities(THETA)
    same(got, tiny.exact_gradient(THETA, wins / np.sqrt(2)))
    exact = tiny.exact_gradient(THETA, rewards)
    cosine = (got * exact).sum() / np.linalg.norm(got) / np.linalg.norm(exact)
    if reward in ("verifier", "vote of others"):  # with two values, winning is the reward
        assert cosine == pytest.approx(1.0, abs=1e-9)
    else:
        assert 0 < cosine < 0.999


def test_grpo_forgets_the_scale_of_rewards_and_rloo_does_not() -> None:
    rewards = REWARDS["token"][PAIRS]
    one, ten = (tiny.expected_estimate(THETA, PAIRS, grpo(s * rewards, epsilon=0.0)) for s in (1, 10))
    same(ten, one)
    one, ten = (tiny.expected_estimate(THETA, PAIRS, rloo(s * rewards)) for s in (1, 10))
    same(ten, 10 * one)


# ------------------------------------------------------------------------- the rewards that move with θ


def test_the_sequence_rewards_estimate_is_the_whole_gradient_of_minus_the_answers_entropy() -> None:
    def minus_entropy(theta: Float64) -> float:
        return float(tiny.probabilities(theta) @ tiny.log_probs(theta).sum(axis=1))

    got = tiny.expected_estimate(THETA, PAIRS, rloo(REWARDS["sequence"][PAIRS]))
    same(got, tiny.slope_of(minus_entropy, THETA))


def test_the_token_reward_leaves_out_just_what_em_ft_follows() -> None:
    def minus_entropies(theta: Float64) -> float:
        return -float(tiny.probabilities(theta) @ tiny.entropies(theta).sum(axis=1))

    em_rl = tiny.expected_estimate(THETA, PAIRS, rloo(REWARDS["token"][PAIRS]))
    chance_of_row = np.zeros((tiny.LENGTH, tiny.V))
    chances = tiny.probabilities(THETA)[:, None].repeat(tiny.LENGTH, axis=1)
    np.add.at(chance_of_row, (tiny.PLACES, tiny.BEFORE), chances)
    of_rows = em_ft(THETA.reshape(-1, tiny.V)).gradient.reshape(THETA.shape)
    em_ft_uphill = -chance_of_row[:, :, None] * of_rows
    whole = tiny.slope_of(minus_entropies, THETA)
    same(em_rl + em_ft_uphill, whole)
    assert np.abs(em_rl - whole).max() > 0.01


def test_the_majority_rewards_estimate_is_half_the_gradient_of_the_expected_share() -> None:
    shares = np.array([majority_reward([LAST[i] for i in pair]) for pair in PAIRS])

    def expected_share(theta: Float64) -> float:
        return float(tiny.probabilities(theta)[PAIRS].prod(axis=1) @ shares.mean(axis=1))

    # The share of an answer with itself, 1/2, is constant, so its estimate has mean 0.
    got = tiny.expected_estimate(THETA, PAIRS, shares)
    same(got, tiny.slope_of(expected_share, THETA) / 2)
    assert not rloo(shares).any()  # in a group of two no advantage is left
    assert not grpo(shares).any()


# ------------------------------------------------------------------------------------------ lengths and KL


def test_where_lengths_differ_only_the_sum_follows_the_expected_reward() -> None:
    rewards = verifier_reward(LAST, 3) + 0.5 * (tiny.ANSWERS[:, 0] == 1)
    ends = tiny.ANSWERS == 4  # token 4 ends an answer; later tokens do not exist
    lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, tiny.LENGTH)
    visible = np.arange(tiny.LENGTH) < lengths[:, None]
    rewards[lengths < tiny.LENGTH] = -1.0
    exact = tiny.exact_gradient(THETA, rewards)
    for averaging, unbiased in (("sum", True), ("sequence", False), ("token", False)):
        weights = np.zeros(visible.shape)
        for i, length in enumerate(lengths):
            weights[i, :length] = averaging_weights([length], averaging)
        slopes = policy_loss(
            tiny.log_probs(THETA), rewards[:, None] * np.ones(tiny.LENGTH), PolicyObjective()
        ).slope
        of_answers = -tiny.probabilities(THETA)[:, None] * weights * slopes
        got = np.tensordot(of_answers, tiny.scores(THETA), axes=2)
        if unbiased:
            same(got, exact)
        else:
            cosine = (got * exact).sum() / np.linalg.norm(got) / np.linalg.norm(exact)
            assert cosine < 0.99


def test_k3_summed_over_tokens_has_the_mean_of_the_answers_kl() -> None:
    reference = tiny.table(1)
    p, log_p, log_r = tiny.probabilities(THETA), tiny.log_probs(THETA), tiny.log_probs(reference)
    want = p @ (log_p - log_r).sum(axis=1)
    assert want > 0.1
    assert p @ k3(log_p, log_r).sum(axis=1) == pytest.approx(want, abs=1e-12)


def test_the_slope_of_k3_is_that_of_the_reverse_kl() -> None:
    random = np.random.default_rng(4)
    z, log_r = random.standard_normal(7), log_softmax(random.standard_normal(7))
    log_p = log_softmax(z)
    terms = policy_loss(log_p, np.zeros(7), PolicyObjective(beta=1.0), reference=log_r)
    got = sum(np.exp(log_p[v]) * terms.slope[v] * log_prob_gradient(log_p, v) for v in range(7))
    reverse = tiny.slope_of(lambda at: float(np.exp(log_r) @ (log_r - log_softmax(at))), z)
    forward = tiny.slope_of(lambda at: float(np.exp(log_softmax(at)) @ (log_softmax(at) - log_r)), z)
    assert np.abs(got - reverse).max() < 1e-9
    assert np.abs(got - forward).max() > 1e-2
