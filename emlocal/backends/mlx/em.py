"""The EM step on blocks of rows: what emlocal.em's references do, in MLX's arrays and in float32.

Apple's GPUs have no float64. Rows are float32 [R, V], with FLOOR for masked tokens; settings are columns,
[R, 1]. The number of rounds is fixed before they begin; a row that is done stays as it is, bit for bit, while
others go on. All are functions of arrays alone, for mx.compile.
"""

import math
from typing import NamedTuple

import mlx.core as mx

from emlocal.em.steps.adaptive_temperature import COLDEST
from emlocal.em.steps.em_inf import BETA1, BETA2, EPSILON

GROUP = 512
"""V is a multiple of it; so many numbers are summed up first."""
FLOOR = -1e20
"""A masked token's logit: its probability is 0, and no product with it is NaN, as with -inf."""
HALVINGS = 28
"""Of the bisection's interval, which is 14 wide: finer than float32 tells temperatures apart."""


class Sharpened(NamedTuple):
    """What an EM step made of rows."""

    z: mx.array
    """[R, V]."""
    entropy_before: mx.array
    """Nats, [R, 1], and so on."""
    entropy_after: mx.array
    steps: mx.array


class Descent(NamedTuple):
    """EM-INF's settings, [R, 1] each."""

    threshold: mx.array
    steps: mx.array
    learning_rate: mx.array
    kl_weight: mx.array


def total(values: mx.array) -> mx.array:
    """Sums of rows, [R, V] → [R, 1], by groups of groups: MLX's CPU adds one after another, which over 49,152
    numbers costs 1e-4 of the sum."""
    grouped = values.reshape(len(values), -1, GROUP // 32, 32)
    return grouped.sum(axis=-1).sum(axis=-1).sum(axis=-1, keepdims=True)


def distribution(z: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """p and log p, [R, V], and the entropy in nats, [R, 1]."""
    shifted = z - z.max(axis=-1, keepdims=True)
    weights = mx.exp(shifted)
    mass = total(weights)
    p, log_p = weights / mass, shifted - mx.log(mass)
    return p, log_p, mx.maximum(-total(p * log_p), 0.0)


def entropy(z: mx.array) -> mx.array:
    """Nats, [R, 1]."""
    return distribution(z)[2]


def gradient_descent(z: mx.array, settings: Descent, rounds: int, *, with_kl: bool) -> Sharpened:
    """EM-INF by gradient descent: ∂H/∂z = −p (log p + H), and with KL also κ (p − p⁰).

    `rounds`: the most steps of any row.
    """
    p, log_p, H = distribution(z)
    p0, before, taken = p, H, mx.zeros_like(H)
    for i in range(rounds):
        active = (settings.steps > i) & (settings.threshold < H)
        gradient = -p * (log_p + H)
        if with_kl:
            gradient = gradient + settings.kl_weight * (p - p0)
        z = mx.where(active, z - settings.learning_rate * gradient, z)
        taken = taken + active
        p, log_p, H = distribution(z)
    return Sharpened(z, before, mx.where(taken > 0, H, before), taken)


def adam(z: mx.array, settings: Descent, rounds: int) -> Sharpened:
    """EM-INF with Adam from a fresh state. Source: Kingma & Ba 2015, algorithm 1."""
    p, log_p, H = distribution(z)
    p0, before, taken = p, H, mx.zeros_like(H)
    mean, square = mx.zeros_like(z), mx.zeros_like(z)
    for i in range(rounds):
        active = (settings.steps > i) & (settings.threshold < H)
        gradient = -p * (log_p + H) + settings.kl_weight * (p - p0)
        mean = mean + (1 - BETA1) * (gradient - mean)
        square = square + (1 - BETA2) * (gradient * gradient - square)
        root = mx.sqrt(square) / math.sqrt(1 - BETA2 ** (i + 1))
        size = settings.learning_rate / (1 - BETA1 ** (i + 1))
        z = mx.where(active, z - size * mean / (root + EPSILON), z)
        taken = taken + active
        p, log_p, H = distribution(z)
    return Sharpened(z, before, mx.where(taken > 0, H, before), taken)


def adaptive_temperature(z: mx.array, ratio: mx.array, threshold: mx.array) -> Sharpened:
    """Cool rows to the entropy max(ratio · H₀, threshold), by bisection of log τ."""
    before = entropy(z)
    target = mx.maximum(ratio * before, threshold)
    low, high = mx.full(before.shape, math.log(COLDEST)), mx.zeros_like(before)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = entropy(z / mx.exp(middle)) <= target
        low, high = mx.where(fits, middle, low), mx.where(fits, high, middle)
    tau = mx.where(entropy(z / COLDEST) > target, COLDEST, mx.exp(low))
    cooled = before > target
    z = mx.where(cooled, z / tau, z)
    return Sharpened(z, before, mx.where(cooled, entropy(z), before), cooled.astype(mx.float32))
