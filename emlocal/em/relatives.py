"""Relatives of EM-RL, for comparison: Clip-Cov, KL-Cov, TW-GRPO. They are not part of the method.

They keep a policy's entropy *up*, and EM-RL lowers it, so by its own measure they work against it
(docs/methods.md, "Its relatives"). They are here so that a comparison runs on the same engine, answers and
draws. They are off by default (--regularize, --token-weights). All of them choose or weigh tokens; only
KL-Cov has a term of its own in the loss (emlocal.em.losses).
"""

import numpy as np
from numpy.typing import ArrayLike

from emlocal.em.entropy import Float64
from emlocal.em.losses import Bool

LARGEST_GAP = 11.0
"""TW-GRPO's bound on a difference of log-probabilities, nats."""


def covariances(advantages: ArrayLike, log_probs: ArrayLike) -> Float64:
    """Returns (A_t − mean A)(ℓ_t − mean ℓ), [M], with means over all tokens.

    A policy gradient lowers the entropy by about the mean of these products. The authors take the current ℓ,
    and means over a micro-batch. Here the means are over a whole step, with ℓ°: they do not depend on how a
    step is cut up, and are the same in the first update. Source: Cui et al. 2025, arXiv 2505.22617.
    """
    a, now = np.asarray(advantages, dtype=np.float64), np.asarray(log_probs, dtype=np.float64)
    product: Float64 = (a - a.mean()) * (now - now.mean())
    return product


def clip_cov(
    covariance: ArrayLike, uniforms: ArrayLike, *, share: float = 2e-4, low: float = 1.0, high: float = 5.0
) -> Bool:
    """Returns Clip-Cov's choice, [M]: the tokens whose policy gradient is dropped (arXiv 2505.22617).

    It takes max(1, ⌊share · M⌋) random tokens of those with low < covariance < high, or all of them if they
    are fewer. Give them advantage 0.

    Args:
        covariance: [M], from `covariances`.
        uniforms: [M], random numbers; the tokens with the least ones are taken.
    """
    cov, order = np.asarray(covariance, dtype=np.float64), np.asarray(uniforms, dtype=np.float64)
    candidates = np.flatnonzero((cov > low) & (cov < high))
    taken = candidates[np.argsort(order[candidates], kind="stable")[: max(1, int(share * len(cov)))]]
    dropped = np.zeros(len(cov), dtype=np.bool_)
    dropped[taken] = True
    return dropped


def kl_cov(covariance: ArrayLike, *, share: float = 2e-3) -> Bool:
    """Returns KL-Cov's choice, [M]: the max(1, ⌊share · M⌋) tokens of highest covariance.

    Give them `pull` 1 (the authors' coefficient), and all tokens ppo-clip with ε = ∞. share: 2e-3 for 7B,
    2e-4 for 32B. In the first update after drawing, ℓ = ℓ°, the pull has slope 0: alone it does nothing.
    Source: arXiv 2505.22617.
    """
    cov = np.asarray(covariance, dtype=np.float64)
    chosen = np.zeros(len(cov), dtype=np.bool_)
    chosen[np.argsort(-cov, kind="stable")[: max(1, int(share * len(cov)))]] = True
    return chosen


def position_divergence(log_p: ArrayLike) -> float:
    """Returns how much a group's answers disagree at one position, ≥ 0.

    It is mean_g Σ_v (e^d − d − 1), d = mean_g log p_gv − log p_gv within ±11. The sum over tokens has no
    weights, so it is not a divergence of distributions: the tail, which is most of the vocabulary, decides
    it. Source: TW-GRPO, arXiv 2505.24718, released code.

    `log_p`: [G, V]; for an answer that has ended, the uniform distribution, log p_v = −log V.
    """
    rows = np.asarray(log_p, dtype=np.float64)
    d = np.clip(rows.mean(axis=0) - rows, -LARGEST_GAP, LARGEST_GAP)
    return float((np.expm1(d) - d).sum(axis=1).mean())


def tw_grpo_weights(divergences: ArrayLike, alpha: float) -> Float64:
    """Returns w_t = 1 + (α − 1) · (D_t − min D) / (max D − min D) of a group's positions, [T].

    All are 1 if all D agree. Multiply the advantages of each answer's token t by w_t. α is 1.7 in the
    authors' runs.

    `divergences`: [T], `position_divergence` at each position up to the end of the group's longest answer.
    The authors continue to the end of the batch's longest answer, where D = 0, so there other prompts change
    the weights.
    """
    d = np.asarray(divergences, dtype=np.float64)
    span = d.max() - d.min()
    return 1 + (alpha - 1) * ((d - d.min()) / span if span > 0 else np.zeros_like(d))
