"""What an answer is worth in EM-RL: one number for each, from the model itself or from its other answers.

Answers are y_1 … y_N to one prompt, with distributions p_t = π(· | y_<t) at their tokens. Numbers of tokens
come flat, [M], one answer after the other; `lengths` [N] says how many tokens each has (M = Σ lengths, at
least one each; an end token counts).

    token           −Σ_t H(p_t)                     paper eq. 4
    sequence        Σ_t log π(y_t | y_<t)           paper eq. 3
    self-certainty  mean_t KL(U ‖ p_t)              Intuitor, arXiv 2505.19590
    majority        share of the N that agree       paper's SC-RL baseline; with `vote`, TTRL's 0 or 1
    verifier        1 where the label is met        the baseline with labels

The paper's two rewards are sums. The authors' code has means instead, under which length costs nothing and
repetition with low entropy pays: hence `normalize`. Every reward is a constant to the gradient that
follows it. For `sequence` that costs nothing, as E[∇ log π] = 0. For `token` it drops E[Σ ∇H(p_t)], which is
just what EM-FT follows. For `majority` it takes the other answers as given: half the gradient of the
expected share.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emlocal.em.entropy import Float64, checked, log_softmax
from emlocal.errors import LogitsError

Normalize = Literal["sum", "mean"]


def token_reward(entropies: ArrayLike, lengths: ArrayLike, normalize: Normalize = "sum") -> Float64:
    """[N], nats: −Σ_t H_t of each answer (paper eq. 4), or with `mean` that by its length (as released).

    `entropies`: [M], H(p_t) over the full vocabulary. Raises ValueError for lengths that do not fit.
    """
    return -_per_answer(entropies, lengths, normalize)


def sequence_reward(log_probs: ArrayLike, lengths: ArrayLike, normalize: Normalize = "sum") -> Float64:
    """[N], nats: Σ_t log π(y_t | y_<t) (paper eq. 3), or with `mean` that by its length (as released).

    `log_probs`: [M], of the tokens that were drawn. Raises ValueError for lengths that do not fit.
    """
    return _per_answer(log_probs, lengths, normalize)


def self_certainty(logits: ArrayLike) -> Float64:
    """KL(U ‖ p) = log Σ_j exp z_j − mean_j z_j − log V of each row, in nats: [M, V] → [M], ≥ 0.

    U is uniform over all V logits that the model's head has, unused ones included. Intuitor's code omits
    log V, which no advantage can tell: it is the same for all answers of a group. It is kept here so that
    the figure is the divergence it is called after: never negative, and 0 where the model knows nothing.

    Raises:
        LogitsError: a masked token (−inf): the divergence is infinite. Also what `checked` refuses.
    """
    z = checked(logits)
    if np.isneginf(z).any():
        raise LogitsError("self-certainty is infinite where a token is masked")
    vocabulary = z.shape[-1]
    divergence: Float64 = -log_softmax(z).mean(axis=-1) - np.log(vocabulary)
    return np.maximum(divergence, 0.0)


def self_certainty_reward(certainties: ArrayLike, lengths: ArrayLike) -> Float64:
    """[N], nats: the mean of `self_certainty` over each answer's tokens (Intuitor).

    `certainties`: [M]. Raises ValueError for lengths that do not fit.
    """
    return _per_answer(certainties, lengths, "mean")


def majority_reward(answers: Sequence[Hashable | None]) -> Float64:
    """[N]: the share of the group's N answers that each agrees with, itself included: 1/N … 1.

    The paper's SC-RL (self-consistency as reward). In a group of two both answers have the same share, so
    no advantage is left: it takes N ≥ 3.

    Args:
        answers: of one group: keys that equivalent answers share (`methods.extraction.canonical`); None
            where no answer could be extracted, which agrees with nothing but itself.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return np.array([1 if answer is None else votes[answer] for answer in answers]) / max(1, len(answers))


def vote_reward(answers: Sequence[Hashable | None]) -> Float64:
    """[N]: 1 where an answer is the one that most of the group gave, else 0 (TTRL, arXiv 2504.16084).

    The earliest on a tie; None does not vote and gets 0. `answers`: as for `majority_reward`.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    winner = max(votes, key=votes.__getitem__) if votes else None
    return np.array([float(answer is not None and answer == winner) for answer in answers])


def verifier_reward(answers: Sequence[Hashable | None], label: Hashable | None) -> Float64:
    """[N]: 1 where an answer is the label, else 0. Both are keys as for `majority_reward`; None gets 0."""
    return np.array([float(answer is not None and answer == label) for answer in answers])


def weighted_sum(rewards: Sequence[ArrayLike], weights: Sequence[float]) -> Float64:
    """Σ_k weight_k · reward_k, of arrays of one shape. Raises ValueError for different numbers or shapes.

    The scales differ: sums of entropies are tens of nats where a verifier says 0 or 1.
    """
    arrays = [np.asarray(reward, dtype=np.float64) for reward in rewards]
    if not arrays or len(arrays) != len(weights) or len({array.shape for array in arrays}) > 1:
        raise ValueError(
            f"{len(arrays)} rewards of shapes {[a.shape for a in arrays]}, {len(weights)} weights"
        )
    return np.tensordot(np.asarray(weights, dtype=np.float64), np.stack(arrays), axes=1)


def checked_lengths(lengths: ArrayLike, tokens: int) -> NDArray[np.int64]:
    """[N] int64. Raises ValueError unless each is at least 1 and they add up to `tokens`."""
    counts = np.asarray(lengths, dtype=np.int64)
    if counts.ndim != 1 or (counts < 1).any() or counts.sum() != tokens:
        raise ValueError(f"lengths {counts.tolist()} do not divide {tokens:,} tokens")
    return counts


def _per_answer(values: ArrayLike, lengths: ArrayLike, normalize: Normalize) -> Float64:
    """[M] → [N]: the sum or mean of each answer's tokens."""
    flat = np.asarray(values, dtype=np.float64)
    counts = checked_lengths(lengths, len(flat))
    ends = np.cumsum(counts)
    sums = np.array([flat[end - n : end].sum() for n, end in zip(counts, ends, strict=True)])
    return sums / counts if normalize == "mean" else sums
