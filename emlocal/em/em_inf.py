"""EM-INF: at each decoding step, descend the entropy of the next-token distribution (paper §4, eq. 5).

The model stays frozen; the logits z of one step are the only parameters. With original distribution p⁰,

    loss(z) = max(H(softmax z), δ) + κ·KL(p⁰ ‖ softmax z)

and gradient steps run until H ≤ δ, tested *before* each step, or until `steps` are spent. κ = 0 is the
paper's equation; the authors' released code adds the KL term and swaps gradient descent for Adam.

This file is the reference: full vocabulary, float64. Decoding uses `emlocal.em.split`, which must agree.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emlocal.em.entropy import Float64, checked, expected_surprisal, finite
from emlocal.settings import EMInf

# Adam's constants, as torch.optim.Adam and Kingma & Ba (2015) have them.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class EMResult:
    """What an EM step did to rows of shape [..., V]."""

    logits: Float64
    """[..., V]; only differences within a row mean anything."""
    entropy_before: Float64
    """[...], nats."""
    entropy_after: Float64
    """[...], nats."""
    steps: NDArray[np.int64]
    """[...], gradient steps taken (for adaptive temperature: 1 where the row was sharpened, else 0)."""


def em_inf(logits: ArrayLike, settings: EMInf) -> EMResult:
    """Minimise max(H, δ) + κ·KL over the logits of each row by itself.

    Args:
        logits: [..., V], any float dtype; −inf marks masked tokens, which stay masked.
    Raises:
        LogitsError: a row with NaN or +inf, or with every token masked.
    """
    z = checked(logits)
    shape = z.shape[:-1]
    rows = z.reshape(-1, z.shape[-1])
    done = [_one_row(row, settings) for row in rows]
    return EMResult(
        logits=np.array([row for row, *_ in done]).reshape(z.shape),
        entropy_before=np.array([before for _, before, _, _ in done]).reshape(shape),
        entropy_after=np.array([after for _, _, after, _ in done]).reshape(shape),
        steps=np.array([steps for *_, steps in done], dtype=np.int64).reshape(shape),
    )


def _one_row(z: Float64, settings: EMInf) -> tuple[Float64, float, float, int]:
    z = z - z.max()  # for the arithmetic's sake: a common shift changes neither p nor H
    descend = Adam(z.shape, settings.learning_rate) if settings.optimizer == "adam" else None
    p0 = before = None
    for step in range(settings.steps + 1):
        log_p, p, H = _distribution(z)
        if p0 is None or before is None:
            p0, before = p, H
        if settings.threshold >= H or step == settings.steps:
            return z, before, H, step
        gradient = -p * (finite(log_p) + H) + settings.kl_weight * (p - p0)
        z = z - (descend.step(gradient) if descend else settings.learning_rate * gradient)
    raise AssertionError("the loop returns at its last round")


def _distribution(z: Float64) -> tuple[Float64, Float64, float]:
    """log p, p and H of one row of logits."""
    shifted = z - z.max()
    log_p = shifted - np.log(np.exp(shifted).sum())
    p = np.exp(log_p)
    return log_p, p, float(expected_surprisal(p, log_p))


class Adam:
    """Adam on a vector of parameters, from a fresh state, as the authors' code makes one for every token.

    Its steps are sign-like: the first is η·g/(|g| + ε), so a token moves by ±η however small its gradient,
    until |g| nears ε = 1e-8. Source: Kingma & Ba 2015, algorithm 1.
    """

    def __init__(self, shape: tuple[int, ...], learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.mean = np.zeros(shape)
        self.square = np.zeros(shape)
        self.steps = 0

    def step(self, gradient: Float64) -> Float64:
        """What to subtract from the parameters, for this gradient (both of the same shape)."""
        self.steps += 1
        self.mean += (1 - BETA1) * (gradient - self.mean)
        self.square += (1 - BETA2) * (gradient * gradient - self.square)
        size = self.learning_rate / (1 - BETA1**self.steps)
        change: Float64 = size * self.mean / (self.root_mean_square() + EPSILON)
        return change

    def root_mean_square(self) -> Float64:
        """√v̂: the bias-corrected root mean square of the gradients so far."""
        root: Float64 = np.sqrt(self.square) / math.sqrt(1 - BETA2**self.steps)
        return root
