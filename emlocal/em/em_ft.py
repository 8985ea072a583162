"""EM-FT: fine-tune on the entropy of the model's own distributions (paper §3.1, eq. 2), with a KL term.

For the logits z of a position that predicts a generated token, at temperature T and with p = softmax(z/T),
p⁰ the same of the model before training:

    loss(z) = H(p) + β·KL(p ‖ p⁰)
    ∂loss/∂z_i = p_i ((β−1) log p_i − β log p⁰_i − H − β·KL) / T

The tokens themselves are constants: no gradient goes through sampling (that is what tells EM-FT from EM-RL).
β = 0 is the paper's equation. Its minimum is a one-hot row, wherever it leads. β > 1 has another: the base
model's own distribution sharpened to temperature (β−1)/β, since loss = (β−1)·KL(p ‖ q) + const with
q ∝ (p⁰)^(β/(β−1)). So β = 2 heads for T = 1/2, and cannot go beyond.

The reference that engines' kernels are tested against: one row after the other, full vocabulary, float64.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from emlocal.em.entropy import Float64, checked, expected_surprisal, finite, log_softmax


class EMFTLoss(NamedTuple):
    """What the rows of a batch cost; nats."""

    entropy: Float64
    """[M]."""
    kl: Float64
    """[M], KL(p ‖ p⁰); zeros where no base was given."""
    gradient: Float64
    """[M, V]: of each row's own loss, by that row's logits."""


def em_ft(
    logits: ArrayLike, base: ArrayLike | None = None, *, beta: float = 0.0, temperature: float = 1.0
) -> EMFTLoss:
    """The loss of each row by itself.

    Args:
        logits: [M, V], any float dtype; −inf marks masked tokens.
        base: [M, V], the logits of the model before training; needed where beta is not 0.
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
    """The temperature of the base distribution that H + β·KL is least at; 0 (a one-hot row) for β ≤ 1."""
    return max(0.0, (beta - 1) / beta) if beta else 0.0
