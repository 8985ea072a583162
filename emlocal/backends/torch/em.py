"""The EM step on blocks of rows: what emlocal.em's references do, in tensors, without asking the host.

Rows are float64 [R, V], with FLOOR for masked tokens; settings are columns, [R, 1]. The number of rounds is
fixed before they begin; a row that is done stays as it is, bit for bit, while others go on.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from emlocal.em.steps.adaptive_temperature import COLDEST, TOLERANCE
from emlocal.em.steps.em_inf import BETA1, BETA2, EPSILON

FLOOR = -1e30
"""A masked token's logit: its probability is 0, and no product with it is NaN, as with -inf."""


class Sharpened(NamedTuple):
    """What an EM step made of rows."""

    z: Tensor
    """[R, V]."""
    entropy_before: Tensor
    """Nats, [R, 1], and so on."""
    entropy_after: Tensor
    steps: Tensor


class Descent(NamedTuple):
    """EM-INF's settings, [R, 1] each."""

    threshold: Tensor
    steps: Tensor
    learning_rate: Tensor
    kl_weight: Tensor


def distribution(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p and log p, [R, V], and the entropy in nats, [R, 1]."""
    shifted = z - z.amax(-1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(-1, keepdim=True)
    p, log_p = weights / total, shifted - total.log()
    return p, log_p, (-(p * log_p).sum(-1, keepdim=True)).clamp_min(0.0)


def entropy(z: Tensor) -> Tensor:
    """Nats, [R, 1]."""
    return distribution(z)[2]


def descend(z: Tensor, threshold: Tensor, allowed: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of gradient descent on the entropy, ∂H/∂z = −p (log p + H), where H > threshold and `allowed`.

    Returns the rows after it, the entropy before it, and which rows it moved. A function of tensors alone,
    for torch.compile.
    """
    p, log_p, H = distribution(z)
    active = allowed & (threshold < H)
    return torch.where(active, z + rate * p * (log_p + H), z), H, active


Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def gradient_descent(z: Tensor, settings: Descent, rounds: int, step: Step = descend) -> Sharpened:
    """EM-INF without the KL term. `rounds`: the most steps of any row; `step`: `descend`, or it compiled."""
    taken = torch.zeros_like(settings.steps)
    before: Tensor | None = None
    for i in range(rounds):
        z, H, active = step(z, settings.threshold, settings.steps > i, settings.learning_rate)
        before = H.clone() if before is None else before
        taken += active
        if _over(active):
            break
    return _sharpened(z, before, taken)


def gradient_descent_with_kl(z: Tensor, settings: Descent, rounds: int) -> Sharpened:
    """EM-INF with the KL term: the gradient is that of the entropy and κ (p − p⁰)."""
    taken = torch.zeros_like(settings.steps)
    before: Tensor | None = None
    p0: Tensor | None = None
    for i in range(rounds):
        p, log_p, H = distribution(z)
        before, p0 = (H, p) if before is None or p0 is None else (before, p0)
        active = (settings.steps > i) & (settings.threshold < H)
        gradient = -p * (log_p + H) + settings.kl_weight * (p - p0)
        z = torch.where(active, z - settings.learning_rate * gradient, z)
        taken += active
        if _over(active):
            break
    return _sharpened(z, before, taken)


def adam(z: Tensor, settings: Descent, rounds: int) -> Sharpened:
    """EM-INF with Adam from a fresh state. Source: Kingma & Ba 2015, algorithm 1."""
    taken = torch.zeros_like(settings.steps)
    before: Tensor | None = None
    p0: Tensor | None = None
    mean, square = torch.zeros_like(z), torch.zeros_like(z)
    for i in range(rounds):
        p, log_p, H = distribution(z)
        before, p0 = (H, p) if before is None or p0 is None else (before, p0)
        active = (settings.steps > i) & (settings.threshold < H)
        gradient = -p * (log_p + H) + settings.kl_weight * (p - p0)
        mean += (1 - BETA1) * (gradient - mean)
        square += (1 - BETA2) * (gradient * gradient - square)
        root = square.sqrt() / math.sqrt(1 - BETA2 ** (i + 1))
        size = settings.learning_rate / (1 - BETA1 ** (i + 1))
        z = torch.where(active, z - size * mean / (root + EPSILON), z)
        taken += active
        if _over(active):
            break
    return _sharpened(z, before, taken)


def adaptive_temperature(z: Tensor, ratio: Tensor, threshold: Tensor) -> Sharpened:
    """Cool rows to the entropy max(ratio · H₀, threshold), by bisection of log τ."""
    before = entropy(z)
    target = torch.maximum(ratio * before, threshold)
    low = torch.full_like(before, math.log(COLDEST))
    high = torch.zeros_like(before)
    for _ in range(math.ceil(math.log2(-math.log(COLDEST) / TOLERANCE))):
        middle = (low + high) / 2
        fits = entropy(z / middle.exp()) <= target
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    tau = torch.where(entropy(z / COLDEST) > target, COLDEST, low.exp())
    cooled = before > target
    return _sharpened(torch.where(cooled, z / tau, z), before, cooled.to(z.dtype))


def _sharpened(z: Tensor, before: Tensor | None, taken: Tensor) -> Sharpened:
    after = entropy(z)
    if before is None:  # no row may take a step
        return Sharpened(z, after, after, taken)
    return Sharpened(z, before, torch.where(taken > 0, after, before), taken)


def _over(active: Tensor) -> bool:
    """Whether no row moves any more, where asking does not wait for the device."""
    return active.device.type == "cpu" and not bool(active.any())
