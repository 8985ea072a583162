"""The Shannon entropy of softmax(z) in nats, and its gradient with respect to the logits z.

All functions take logits of shape [..., V] in any float dtype and work in float64. They treat every row by
itself: no bit of a row's result depends on the rows beside it.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emlocal.errors import LogitsError

Float64 = NDArray[np.float64]


def checked(logits: ArrayLike) -> Float64:
    """Returns `logits` as a C-contiguous float64 array, if each row is a distribution.

    −inf marks a masked token (probability 0). Raises LogitsError for NaN, +inf, an empty row, or a row in
    which every token is masked.
    """
    z = np.asarray(logits, dtype=np.float64, order="C")
    if z.ndim == 0 or z.shape[-1] == 0:
        raise LogitsError("a row of logits needs at least one token")
    top = z.max(axis=-1)  # NaN wins every max, so one look at the maxima finds all three faults
    if not np.isfinite(top).all():
        if np.isnan(top).any():
            raise LogitsError("the logits contain NaN")
        if np.isposinf(top).any():
            raise LogitsError("the logits contain +inf")
        raise LogitsError("every token of a row is masked")
    return z


def log_softmax(logits: ArrayLike) -> Float64:
    """Returns log p_i = z_i − log Σ_j exp z_j, shape [..., V]; −inf where z_i is −inf."""
    z = checked(logits)
    shifted = z - z.max(axis=-1, keepdims=True)
    log_p: Float64 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_p


def entropy(logits: ArrayLike) -> Float64:
    """Returns H = −Σ_i p_i log p_i of p = softmax(logits), in nats, shape [...]; 0 ≤ H ≤ log V."""
    log_p = log_softmax(logits)
    p = np.exp(log_p)
    return expected_surprisal(p, log_p)


def expected_surprisal(p: Float64, log_p: Float64) -> Float64:
    """Returns −Σ_i p_i log_p_i, counting 0·(−inf) as 0, and never below 0."""
    total: Float64 = -np.where(p > 0, p * finite(log_p), 0.0).sum(axis=-1)
    not_below_zero: Float64 = np.maximum(total, 0.0)
    return not_below_zero


def finite(log_p: Float64) -> Float64:
    """Returns `log_p` with 0 in place of −inf, for products with a probability that is 0 there."""
    return np.where(np.isneginf(log_p), 0.0, log_p)


def entropy_gradient(logits: ArrayLike) -> Float64:
    """Returns ∂H/∂z_i = −p_i (log p_i + H), shape [..., V].

    It sums to 0, because entropy ignores a common shift of z. Source: paper, Proposition 1; from ∂p_j/∂z_i =
    p_j (δ_ij − p_i).
    """
    log_p = log_softmax(logits)
    p = np.exp(log_p)
    return -p * (finite(log_p) + expected_surprisal(p, log_p)[..., None])
