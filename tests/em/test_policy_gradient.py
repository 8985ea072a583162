"""Losses, their slopes, k3, averaging, Clip-Cov, KL-Cov and TW-GRPO, compared with naive loops."""

import math

import numpy as np
import pytest

from emlocal.em.entropy import log_softmax
from emlocal.em.losses import PolicyObjective, averaging_weights, k3, log_prob_gradient, policy_loss
from emlocal.em.relatives import clip_cov, covariances, kl_cov, position_divergence, tw_grpo_weights

RANDOM = np.random.default_rng(7)
M = 60
NOW, OLD, REFERENCE = -np.abs(RANDOM.standard_normal((3, M)))
ADVANTAGES = RANDOM.standard_normal(M)
ENTROPIES = np.abs(RANDOM.standard_normal(M))
PULL = (np.arange(M) % 5 == 0).astype(float)
OBJECTIVES = [
    PolicyObjective("reinforce"),
    PolicyObjective("reinforce", beta=0.3),
    PolicyObjective("ppo-clip"),
    PolicyObjective("ppo-clip", clip_low=0.1, clip_high=0.5, beta=0.001),
    PolicyObjective("ppo-clip", clip_low=math.inf, clip_high=math.inf),
    PolicyObjective("reinforce", entropy_bonus=-1.0),
    PolicyObjective("ppo-clip", beta=0.3, entropy_bonus=0.7),
]


def one_by_one(i: int, objective: PolicyObjective, now: float, pull: float) -> tuple[float, bool, float]:
    """Returns loss, whether it is clipped, and k3 of a single token, straight from the equations."""
    a, ratio = ADVANTAGES[i], math.exp(now - OLD[i])
    if objective.kind == "reinforce":
        loss, clipped = -a * now, False
    else:
        held = min(max(ratio, 1 - objective.clip_low), 1 + objective.clip_high)
        loss, clipped = -min(ratio * a, held * a), held * a < ratio * a
    d = REFERENCE[i] - now
    kl = math.exp(d) - d - 1
    loss += objective.beta * kl + pull * abs(now - OLD[i]) - objective.entropy_bonus * ENTROPIES[i]
    return loss, clipped, kl


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("pull", [None, PULL], ids=["", "kl-cov"])
def test_the_losses_token_by_token(objective: PolicyObjective, pull: np.ndarray | None) -> None:
    found = policy_loss(
        NOW, ADVANTAGES, objective, old=OLD, reference=REFERENCE, pull=pull, entropies=ENTROPIES
    )
    for i in range(M):
        kappa = 0.0 if pull is None else pull[i]
        loss, clipped, kl = one_by_one(i, objective, NOW[i], kappa)
        assert found.loss[i] == pytest.approx(loss, abs=1e-12)
        assert found.clipped[i] == clipped
        assert found.kl[i] == pytest.approx(kl, abs=1e-12)
        up, down = (one_by_one(i, objective, NOW[i] + step, kappa)[0] for step in (1e-6, -1e-6))
        assert found.slope[i] == pytest.approx((up - down) / 2e-6, abs=1e-7)
    if objective.clip_low == 0.1:
        assert 5 < found.clipped.sum() < M - 5  # both kinds occur


def test_just_drawn_both_losses_have_the_same_slope_and_kl_cov_none() -> None:
    for beta in (0.0, 0.1):
        slopes = [
            policy_loss(
                NOW, ADVANTAGES, PolicyObjective(kind, beta=beta), old=NOW, reference=REFERENCE, pull=pull
            ).slope
            for kind in ("reinforce", "ppo-clip")
            for pull in (None, PULL)
        ]
        for slope in slopes[1:]:
            assert np.allclose(slope, slopes[0], atol=1e-14)


def test_clipping_lets_tokens_come_back() -> None:
    # ρ = 2 and 1/2, good and bad answers: a token that went too far in its own direction is held, others are
    # not
    now, old = np.log([2, 2, 0.5, 0.5]), np.zeros(4)
    found = policy_loss(now, [1, -1, 1, -1], PolicyObjective("ppo-clip"), old=old)
    assert found.clipped.tolist() == [True, False, False, True]
    assert found.slope == pytest.approx([0, 2, -0.5, 0])
    assert found.loss == pytest.approx([-1.2, 2, -0.5, 0.8])


def test_what_is_needed_must_be_there() -> None:
    with pytest.raises(ValueError, match="drawn with"):
        policy_loss(NOW, ADVANTAGES, PolicyObjective("ppo-clip"))
    with pytest.raises(ValueError, match="drawn with"):
        policy_loss(NOW, ADVANTAGES, PolicyObjective(), pull=PULL)
    with pytest.raises(ValueError, match="reference"):
        policy_loss(NOW, ADVANTAGES, PolicyObjective(beta=0.1))
    with pytest.raises(ValueError, match="entropies"):
        policy_loss(NOW, ADVANTAGES, PolicyObjective(entropy_bonus=0.1))


def test_k3_is_its_definition_and_never_negative() -> None:
    for p, r in [(-1.0, -2.0), (-2.0, -1.0), (-0.5, -0.5)]:
        assert k3(p, r) == pytest.approx(math.exp(r - p) - (r - p) - 1)
    for near in (1e-16, 1e-9, 1e-4):
        assert (k3(NOW, NOW + near * RANDOM.standard_normal(M)) >= 0).all()
    assert (k3(NOW, REFERENCE) > 0).all()
    assert not k3(NOW, NOW).any()


def test_k3s_mean_under_the_policy_is_the_kl() -> None:
    log_p, log_r = log_softmax(3 * RANDOM.standard_normal((2, 9)))
    assert np.exp(log_p) @ k3(log_p, log_r) == pytest.approx(np.exp(log_p) @ (log_p - log_r), abs=1e-12)


def test_weights_of_tokens() -> None:
    assert averaging_weights([2, 1, 3], "token") == pytest.approx([1 / 6] * 6)
    assert averaging_weights([2, 1, 3], "sequence") == pytest.approx([1 / 6, 1 / 6, 1 / 3, *[1 / 9] * 3])
    assert averaging_weights([2, 1, 3], "sum") == pytest.approx([1 / 3] * 6)
    for averaging in ("token", "sequence"):
        assert averaging_weights([5, 1, 9, 2], averaging).sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="lengths"):
        averaging_weights([2, 0], "token")


def test_the_gradient_of_a_log_probability() -> None:
    z = RANDOM.standard_normal(6)
    got = log_prob_gradient(log_softmax(z), 2)
    for v in range(6):
        step = 1e-6 * np.eye(6)[v]
        slope = (log_softmax(z + step)[2] - log_softmax(z - step)[2]) / 2e-6
        assert got[v] == pytest.approx(slope, abs=1e-8)


# ------------------------------------------------------------------------------- which tokens to hold back


def test_covariances_by_a_loop() -> None:
    found = covariances(ADVANTAGES, NOW)
    mean_a, mean_l = sum(ADVANTAGES) / M, sum(NOW) / M
    for i in range(M):
        assert found[i] == pytest.approx((ADVANTAGES[i] - mean_a) * (NOW[i] - mean_l), abs=1e-12)
    assert found.mean() == pytest.approx(np.cov(ADVANTAGES, NOW, ddof=0)[0, 1])


@pytest.mark.parametrize("share", [1e-4, 0.05, 0.1, 1.0])
def test_clip_cov_by_a_loop(share: float) -> None:
    cov, uniforms = 3 * RANDOM.standard_normal(200), RANDOM.random(200)
    left = max(1, math.floor(share * 200))
    expected = [False] * 200
    for _, i in sorted((uniforms[i], i) for i in range(200)):
        if left and 1.0 < cov[i] < 5.0:
            expected[i] = True
            left -= 1
    assert clip_cov(cov, uniforms, share=share).tolist() == expected
    assert any(expected)


def test_clip_cov_takes_each_candidate_as_often_and_none_where_there_are_none() -> None:
    assert not clip_cov([1.0, 5.0, -2.0, 0.5], [0.1, 0.2, 0.3, 0.4]).any()
    taken = sum(clip_cov([2.0, 0.0, 3.0, 4.9], RANDOM.random(4)).astype(int) for _ in range(3000))
    assert taken[1] == 0
    assert (abs(taken[[0, 2, 3]] - 1000) < 130).all()  # five standard deviations


@pytest.mark.parametrize("share", [1e-4, 0.02, 0.5, 1.0])
def test_kl_cov_by_a_loop(share: float) -> None:
    cov = RANDOM.standard_normal(150)
    left = max(1, math.floor(share * 150))
    expected = [sum(other > mine for other in cov) < left for mine in cov]
    assert kl_cov(cov, share=share).tolist() == expected


def test_kl_cov_takes_the_first_of_equals() -> None:
    assert kl_cov([1.0, 2.0, 2.0, 2.0], share=0.5).tolist() == [False, True, True, False]


def test_how_much_a_group_disagrees_by_a_loop() -> None:
    log_p = log_softmax(8 * RANDOM.standard_normal((3, 11)))
    total = 0.0
    for g in range(3):
        for v in range(11):
            d = sum(log_p[h, v] for h in range(3)) / 3 - log_p[g, v]
            d = min(max(d, -11.0), 11.0)
            total += (math.exp(d) - d - 1) / 3
    assert position_divergence(log_p) == pytest.approx(total)
    assert position_divergence(np.repeat(log_p[:1], 4, axis=0)) == pytest.approx(0, abs=1e-12)


def test_weights_of_positions() -> None:
    assert tw_grpo_weights([3.0, 1.0, 2.0], 1.7) == pytest.approx([1.7, 1.0, 1.35])
    assert tw_grpo_weights([0.5, 0.5], 1.7).tolist() == [1, 1]
    assert tw_grpo_weights([4.0], 1.7).tolist() == [1]
