"""How much better an answer is than the others to the same prompt: RLOO and GRPO.

Rewards come as [P, N]: N answers to each of P prompts. A group whose rewards are all the same teaches
nothing, and its advantages are exactly 0.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emlocal.em.entropy import Float64

GRPO_EPSILON = 1e-6
"""What is added to a group's standard deviation: the default of verl, the paper's framework."""


def rloo(rewards: ArrayLike) -> Float64:
    """A_i = r_i − mean of the others' r = N/(N−1) · (r_i − mean r), [P, N] (the paper's).

    REINFORCE leave-one-out: Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740. As the
    baseline of y_i does not depend on y_i, the policy gradient stays unbiased, provided that r_i does not
    depend on the other answers (which `majority` does).

    Raises ValueError for groups of fewer than two.
    """
    centred, _ = _centred(rewards)
    n = centred.shape[-1]
    advantages: Float64 = centred * (n / (n - 1))
    return advantages


def grpo(rewards: ArrayLike, epsilon: float = GRPO_EPSILON) -> Float64:
    """A_i = (r_i − mean r) / (std r + ε), [P, N] (Shao et al. 2024, arXiv 2402.03300, §4.1.2).

    std is that of a sample, by N−1, as torch's and so as in verl and TRL (whose ε is 1e-4). The scale of
    the rewards cancels. That makes the policy gradient biased: it follows another objective than the
    expected reward. With N = 2 only the sign of r_1 − r_2 is left, so it climbs the probability of winning.

    Raises ValueError for groups of fewer than two.
    """
    centred, same = _centred(rewards)
    deviation = np.where(same, 1.0, centred.std(axis=-1, ddof=1, keepdims=True))
    return centred / (deviation + epsilon)


def zero_variance(rewards: ArrayLike) -> NDArray[np.bool_]:
    """[P]: groups whose rewards are all the same, for the metrics."""
    r = np.asarray(rewards, dtype=np.float64)
    same: NDArray[np.bool_] = r.max(axis=-1) == r.min(axis=-1)
    return same


def _centred(rewards: ArrayLike) -> tuple[Float64, NDArray[np.bool_]]:
    """r − mean r, exactly 0 in groups without variance (whose mean may be rounded); and which they are."""
    r = np.asarray(rewards, dtype=np.float64)
    if r.ndim != 2 or r.shape[1] < 2:
        raise ValueError(f"rewards of shape {r.shape}: it takes [prompts, answers], two answers at least")
    same = zero_variance(r)[:, None]
    return np.where(same, 0.0, r - r.mean(axis=-1, keepdims=True)), same
