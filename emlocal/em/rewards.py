"""The rewards of EM-RL, and the advantage of an answer over the others to the same prompt.

A reward is one number for each answer, computed from the model itself or from the model's other answers.

Answers are y_1 … y_N to one prompt, with distributions p_t = π(· | y_<t) at their tokens. Arrays over tokens
are flat, [M], one answer after the other. `lengths` [N] says how many tokens each answer has (M = Σ lengths,
at least one each; an end token counts).

    token           −Σ_t H(p_t)                     paper eq. 4
    sequence        Σ_t log π(y_t | y_<t)           paper eq. 3
    self-certainty  mean_t KL(U ‖ p_t)              Intuitor, arXiv 2505.19590
    majority        share of the N that agree       paper's SC-RL baseline; with `vote`, TTRL's 0 or 1
    verifier        1 where the label is met        the baseline with labels

The paper's two rewards are sums. The authors' code has means instead, under which length costs nothing and
repetition with low entropy pays: hence `normalize`. The gradient treats every reward as a constant. For
`sequence` that costs nothing, as E[∇ log π] = 0. For `token` it drops E[Σ ∇H(p_t)], which is exactly what
EM-FT follows. For `majority` it takes the other answers as given, which leaves half the gradient of the
expected share.

Advantages (RLOO, GRPO) take rewards as [P, N]: N answers to each of P prompts. If all rewards of a group are
the same, the group teaches nothing, and its advantages are exactly 0.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emlocal.em.entropy import Float64, checked, log_softmax
from emlocal.errors import LogitsError

Normalize = Literal["sum", "mean"]
GRPO_EPSILON = 1e-6
"""The number added to a group's standard deviation: the default of verl, the paper's framework."""


def token_reward(entropies: ArrayLike, lengths: ArrayLike, normalize: Normalize = "sum") -> Float64:
    """Returns −Σ_t H_t of each answer (paper eq. 4), [N], nats; with `mean`, divided by length (as released).

    `entropies`: [M], H(p_t) over the full vocabulary. Raises ValueError for lengths that do not fit.
    """
    return -_per_answer(entropies, lengths, normalize)


def sequence_reward(log_probs: ArrayLike, lengths: ArrayLike, normalize: Normalize = "sum") -> Float64:
    """Returns Σ_t log π(y_t | y_<t) (paper eq. 3), [N], nats; with `mean`, divided by length (as released).

    `log_probs`: [M], of the tokens that were drawn. Raises ValueError for lengths that do not fit.
    """
    return _per_answer(log_probs, lengths, normalize)


def self_certainty(logits: ArrayLike) -> Float64:
    """Returns KL(U ‖ p) = log Σ_j exp z_j − mean_j z_j − log V of each row, in nats: [M, V] → [M], ≥ 0.

    U is uniform over all V logits of the model's head, unused ones included. Intuitor's code omits log V.
    That changes no advantage, because log V is the same for all answers of a group. It is kept here so that
    the figure is the divergence that its name says: never negative, and 0 if the model knows nothing.

    Raises:
        LogitsError: a masked token (−inf), which makes the divergence infinite. Also what `checked` refuses.
    """
    z = checked(logits)
    if np.isneginf(z).any():
        raise LogitsError("self-certainty is infinite where a token is masked")
    vocabulary = z.shape[-1]
    divergence: Float64 = -log_softmax(z).mean(axis=-1) - np.log(vocabulary)
    return np.maximum(divergence, 0.0)


def self_certainty_reward(certainties: ArrayLike, lengths: ArrayLike) -> Float64:
    """Returns the mean of `self_certainty` over each answer's tokens (Intuitor), [N], nats.

    `certainties`: [M]. Raises ValueError for lengths that do not fit.
    """
    return _per_answer(certainties, lengths, "mean")


def majority_reward(answers: Sequence[Hashable | None]) -> Float64:
    """Returns the share of the group's N answers that agree with each answer, itself included: [N], 1/N … 1.

    This is the paper's SC-RL (self-consistency as reward). In a group of two both answers have the same
    share, which leaves no advantage: it takes N ≥ 3.

    Args:
        answers: the group's answers as keys that equivalent answers share (`answers.meaning.canonical`); None
            if no answer could be extracted. None agrees with nothing but itself.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return np.array([1 if answer is None else votes[answer] for answer in answers]) / max(1, len(answers))


def vote_reward(answers: Sequence[Hashable | None]) -> Float64:
    """Returns 1 for each answer that most of the group gave, else 0: [N] (TTRL, arXiv 2504.16084).

    On a tie the earliest answer wins. None does not vote and gets 0. `answers`: as for `majority_reward`.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    winner = max(votes, key=votes.__getitem__) if votes else None
    return np.array([float(answer is not None and answer == winner) for answer in answers])


def verifier_reward(answers: Sequence[Hashable | None], label: Hashable | None) -> Float64:
    """Returns 1 for each answer that equals the label, else 0: [N]. None gets 0.

    Both are keys as for `majority_reward`.
    """
    return np.array([float(answer is not None and answer == label) for answer in answers])


def weighted_sum(rewards: Sequence[ArrayLike], weights: Sequence[float]) -> Float64:
    """Returns Σ_k weight_k · reward_k, of arrays of one shape.

    The scales differ: sums of entropies are tens of nats, a verifier's rewards are 0 or 1. Raises ValueError
    for different numbers or shapes.
    """
    arrays = [np.asarray(reward, dtype=np.float64) for reward in rewards]
    if not arrays or len(arrays) != len(weights) or len({array.shape for array in arrays}) > 1:
        raise ValueError(
            f"{len(arrays)} rewards of shapes {[a.shape for a in arrays]}, {len(weights)} weights"
        )
    return np.tensordot(np.asarray(weights, dtype=np.float64), np.stack(arrays), axes=1)


def checked_lengths(lengths: ArrayLike, tokens: int) -> NDArray[np.int64]:
    """Returns the lengths as int64 [N].

    Raises ValueError unless each is at least 1 and they add up to `tokens`.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    if counts.ndim != 1 or (counts < 1).any() or counts.sum() != tokens:
        raise ValueError(f"lengths {counts.tolist()} do not divide {tokens:,} tokens")
    return counts


def _per_answer(values: ArrayLike, lengths: ArrayLike, normalize: Normalize) -> Float64:
    """Returns the sum or mean over each answer's tokens: [M] → [N]."""
    flat = np.asarray(values, dtype=np.float64)
    counts = checked_lengths(lengths, len(flat))
    ends = np.cumsum(counts)
    sums = np.array([flat[end - n : end].sum() for n, end in zip(counts, ends, strict=True)])
    return sums / counts if normalize == "mean" else sums


def rloo(rewards: ArrayLike) -> Float64:
    """Returns A_i = r_i − mean of the others' r = N/(N−1) · (r_i − mean r), [P, N] (the paper's).

    REINFORCE leave-one-out: Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740. The baseline of y_i
    does not depend on y_i, so the policy gradient stays unbiased, provided that r_i does not depend on the
    other answers (for `majority` it does).

    Raises ValueError for groups of fewer than two.
    """
    centred, _ = _centred(rewards)
    n = centred.shape[-1]
    advantages: Float64 = centred * (n / (n - 1))
    return advantages


def grpo(rewards: ArrayLike, epsilon: float = GRPO_EPSILON) -> Float64:
    """Returns A_i = (r_i − mean r) / (std r + ε), [P, N] (Shao et al. 2024, arXiv 2402.03300, §4.1.2).

    std is that of a sample, divided by N−1, as in torch and therefore in verl and TRL (whose ε is 1e-4). The
    scale of the rewards cancels. That makes the policy gradient biased: it follows another objective than the
    expected reward. With N = 2 only the sign of r_1 − r_2 is left, so it climbs the probability of winning.

    Raises ValueError for groups of fewer than two.
    """
    centred, same = _centred(rewards)
    deviation = np.where(same, 1.0, centred.std(axis=-1, ddof=1, keepdims=True))
    return centred / (deviation + epsilon)


def zero_variance(rewards: ArrayLike) -> NDArray[np.bool_]:
    """Returns which groups have rewards that are all the same, [P], for the metrics."""
    r = np.asarray(rewards, dtype=np.float64)
    same: NDArray[np.bool_] = r.max(axis=-1) == r.min(axis=-1)
    return same


def _centred(rewards: ArrayLike) -> tuple[Float64, NDArray[np.bool_]]:
    """Returns r − mean r, and which groups have no variance.

    In those groups the result is exactly 0, although their mean may be rounded.
    """
    r = np.asarray(rewards, dtype=np.float64)
    if r.ndim != 2 or r.shape[1] < 2:
        raise ValueError(
            f"rewards of shape {r.shape}; they must be [prompts, answers] with at least two answers"
        )
    same = zero_variance(r)[:, None]
    return np.where(same, 0.0, r - r.mean(axis=-1, keepdims=True)), same
