"""The losses of EM-RL and EM-FT: the reference that the engines' kernels are tested against.

EM-RL's loss is the policy gradient of drawn tokens, with terms that keep the policy near where it was. It is
about M drawn tokens, flat. ℓ_t = log π(y_t | y_<t) is the current log-probability, ℓ°_t the one when the
token was drawn ("old"), and ℓʳ_t the reference's (the model without its adapter). A_t is the advantage of the
token's answer. With the ratio ρ_t = exp(ℓ_t − ℓ°_t), a token's loss is

    reinforce   −A_t ℓ_t                                            Williams 1992; slope −A_t
    ppo-clip    −min(ρ_t A_t, clip(ρ_t, 1−ε_low, 1+ε_high) A_t)     Schulman et al. 2017, eq. 7
                                                                    slope −A_t ρ_t, 0 where clipped

    + β k3_t,           k3 = e^d − d − 1 with d = ℓʳ − ℓ            Schulman 2020; slope β (1 − e^d)
    + κ_t |ℓ_t − ℓ°_t|  on KL-Cov's tokens                          arXiv 2505.22617; slope κ_t sign(ℓ − ℓ°)
    − c H_t                                                         the entropy bonus; c = 0 by default

"Slope" is the derivative with respect to ℓ_t. The gradient with respect to logits is slope · (1[v = y_t] −
p_v) / T, and that of the bonus is c p_v (log p_v + H) / T. While ρ = 1 (the first update after drawing) both
losses have the same slope. The released code left a bonus of 0.001 on, which works against the method. With c
= −1 the bonus is the term that the token reward omits and that EM-FT follows.

k3 is never negative, and its mean over tokens drawn from π is KL(π ‖ reference). As a loss, however, it is
followed through ℓ_t alone, and the mean of that slope is the gradient of the reverse, KL(reference ‖ π).

Clip-Cov and TW-GRPO (`emlocal.em.relatives`) need no loss of their own: both scale the advantages of tokens,
by 0 and by w_t > 0.

EM-FT fine-tunes on the entropy of the model's own distributions (paper §3.1, eq. 2), with a KL term. Let z be
the logits of a position that predicts a generated token, T the temperature, p = softmax(z/T), and p⁰ the same
distribution of the model before training:

    loss(z) = H(p) + β·KL(p ‖ p⁰)
    ∂loss/∂z_i = p_i ((β−1) log p_i − β log p⁰_i − H − β·KL) / T

The tokens themselves are constants: no gradient goes through sampling, unlike in EM-RL. β = 0 is the paper's
equation. Its minimum is a one-hot row, wherever that leads. β > 1 has another minimum: the base model's own
distribution, sharpened to temperature (β−1)/β, since loss = (β−1)·KL(p ‖ q) + const with q ∝ (p⁰)^(β/(β−1)).
So β = 2 leads to T = 1/2, and cannot go beyond.

Both are written plainly: one row after the other, full vocabulary, float64.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emlocal.em.entropy import Float64, checked, expected_surprisal, finite, log_softmax
from emlocal.em.rewards import checked_lengths

Kind = Literal["reinforce", "ppo-clip"]
Averaging = Literal["token", "sequence", "sum"]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class PolicyObjective:
    """The choice of a policy loss. ε = ∞ turns the clipping off, as KL-Cov does."""

    kind: Kind = "reinforce"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    """Weight of k3 to the reference."""
    entropy_bonus: float = 0.0
    """c, the weight of the entropy bonus."""


class PolicyTerms(NamedTuple):
    """The loss of each token, and its parts."""

    loss: Float64
    """[M], unweighted."""
    slope: Float64
    """[M], ∂loss_t / ∂ℓ_t."""
    clipped: Bool
    """[M]: whether the policy term is held at the clip and gives no slope."""
    kl: Float64
    """[M], k3 in nats; zeros without a reference."""


def policy_loss(
    log_probs: ArrayLike,
    advantages: ArrayLike,
    objective: PolicyObjective,
    *,
    old: ArrayLike | None = None,
    reference: ArrayLike | None = None,
    pull: ArrayLike | None = None,
    entropies: ArrayLike | None = None,
) -> PolicyTerms:
    """Returns the loss of each token by itself; `averaging_weights` says how they add up.

    Args:
        log_probs: [M], ℓ, nats.
        advantages: [M], A of each token.
        old: [M], ℓ°; needed for ppo-clip and for `pull`.
        reference: [M], ℓʳ; needed if beta is not 0.
        pull: [M], κ of KL-Cov: its coefficient at the tokens that it chose, else 0.
        entropies: [M], H; needed for the entropy bonus, whose gradient is not part of the slope.
    Raises:
        ValueError: a needed array is missing.
    """
    now, a = np.asarray(log_probs, dtype=np.float64), np.asarray(advantages, dtype=np.float64)
    if old is None and (objective.kind == "ppo-clip" or pull is not None):
        raise ValueError("ppo-clip and KL-Cov need the log-probabilities that the tokens were drawn with")
    if objective.beta and reference is None:
        raise ValueError("the KL term needs the log-probabilities of the reference")
    moved = np.zeros_like(now) if old is None else now - np.asarray(old, dtype=np.float64)
    clipped = np.zeros(now.shape, dtype=np.bool_)
    loss, slope = -a * now, -a
    if objective.kind == "ppo-clip":
        loss, slope, clipped = _ppo_clip(np.exp(moved), a, objective)
    kl = np.zeros_like(now)
    if reference is not None:
        gap = np.asarray(reference, dtype=np.float64) - now
        kl = k3(now, reference)
        loss, slope = loss + objective.beta * kl, slope - objective.beta * np.expm1(gap)
    if pull is not None:
        kappa = np.asarray(pull, dtype=np.float64)
        loss, slope = loss + kappa * np.abs(moved), slope + kappa * np.sign(moved)
    if objective.entropy_bonus:
        if entropies is None:
            raise ValueError("the entropy bonus needs the tokens' entropies")
        loss = loss - objective.entropy_bonus * np.asarray(entropies, dtype=np.float64)
    return PolicyTerms(loss, slope, clipped, kl)


def _ppo_clip(ratio: Float64, a: Float64, objective: PolicyObjective) -> tuple[Float64, Float64, Bool]:
    """Returns the loss, its slope and whether it is clipped, each [M]."""
    held = np.clip(ratio, 1 - objective.clip_low, 1 + objective.clip_high) * a
    clipped = held < ratio * a
    loss = -np.where(clipped, held, ratio * a)
    return loss, np.where(clipped, 0.0, -ratio * a), clipped


def k3(log_probs: ArrayLike, reference: ArrayLike) -> Float64:
    """Returns e^d − d − 1 ≥ 0 with d = ℓʳ − ℓ, per token, nats.

    Over tokens drawn from π its mean is KL(π ‖ reference): E[e^d] = 1, and E[−d] is the divergence. Source:
    Schulman 2020, "Approximating KL Divergence".
    """
    d = np.asarray(reference, dtype=np.float64) - np.asarray(log_probs, dtype=np.float64)
    estimate: Float64 = np.expm1(d) - d
    return estimate


def averaging_weights(lengths: ArrayLike, averaging: Averaging) -> Float64:
    """Returns the weight of each token's loss, [M], for N ≥ 1 answers of these lengths [N], M = Σ lengths.

    - token: 1/M, the mean over all tokens (verl's default, the paper's runs).
    - sequence: 1/(N·length), the mean over answers of the mean over their tokens (GRPO's eq. 3).
    - sum: 1/N, the mean over answers of the sum over their tokens.

    If lengths differ, only `sum` follows the gradient of the expected reward. `token` has its direction
    within a step, but steps with long answers are shorter. `sequence` gives the tokens of long answers less
    weight, so a long wrong answer is hardly blamed.

    Raises ValueError for lengths below 1.
    """
    counts = checked_lengths(lengths, int(np.sum(lengths)))
    n, total = len(counts), counts.sum()
    per_answer = {
        "token": np.full(n, 1 / total),
        "sequence": 1 / (n * counts),
        "sum": np.full(n, 1 / n),
    }
    return np.repeat(per_answer[averaging], counts)


def log_prob_gradient(log_p: Float64, token: int) -> Float64:
    """Returns ∂ log p[token] / ∂z = 1[v = token] − p_v, [V], of a row log p = log_softmax(z), at T = 1."""
    gradient: Float64 = -np.exp(log_p)
    gradient[token] += 1
    return gradient


class EMFTLoss(NamedTuple):
    """The loss of each row of a batch and its gradient; nats."""

    entropy: Float64
    """[M]."""
    kl: Float64
    """[M], KL(p ‖ p⁰); zeros if no base was given."""
    gradient: Float64
    """[M, V]: the gradient of each row's own loss with respect to that row's logits."""


def em_ft(
    logits: ArrayLike, base: ArrayLike | None = None, *, beta: float = 0.0, temperature: float = 1.0
) -> EMFTLoss:
    """Returns the loss of each row by itself.

    Args:
        logits: [M, V], any float dtype; −inf marks masked tokens.
        base: [M, V], the logits of the model before training; needed if beta is not 0.
        beta: weight of the KL term.
        temperature: T > 0.
    Raises:
        LogitsError: a row with NaN or +inf, or with every token masked.
        ValueError: beta without base.
    """
    if beta and base is None:
        raise ValueError("the KL term needs the logits of the base model")
    z = checked(logits) / temperature
    z0 = None if base is None else checked(base) / temperature
    entropies, kls, gradients = np.zeros(len(z)), np.zeros(len(z)), np.zeros(z.shape)
    for i, row in enumerate(z):
        log_p = log_softmax(row)
        p = np.exp(log_p)
        entropies[i] = expected_surprisal(p, log_p)
        ratio = np.zeros_like(log_p) if z0 is None else finite(log_p) - finite(log_softmax(z0[i]))
        kls[i] = (p * ratio).sum()
        gradients[i] = -p * (finite(log_p) + entropies[i]) + beta * p * (ratio - kls[i])
    return EMFTLoss(entropies, kls, gradients / temperature)


def tempered_by(beta: float) -> float:
    """Returns the temperature of the base distribution at which H + β·KL is least.

    It is 0 (a one-hot row) for β ≤ 1.
    """
    return max(0.0, (beta - 1) / beta) if beta else 0.0
