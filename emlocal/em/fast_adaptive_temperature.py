"""The fast way of adaptive temperature, and of a power: on a row split into head and tail, with a bound on
the error.

At β = 1/τ ≥ 1 a token's weight is w^β. The tail's mass is only known between two bounds,

    M_0 exp((β−1) s̄)  ≤  Σ_tail w^β  ≤  M_0 c^(β−1),

the lower by Jensen with the tail's mean exponent s̄, the upper since w ≤ c, the cutoff. Both shrink fast as β
grows. With Δ half the width between them over S, H is off by at most δH = Δ(1 + β|s̄| + |log S|). As
dH/d log β = −Var(β s), β is then off by a factor of 1 + δH/Var, which moves the distribution by at most
δH/(2√Var) in total variation, and the tail moves it by Δ. Where that exceeds `TOLERANCE`
the caller tries a narrower cutoff and then the reference.
"""

import math

import numpy as np

from emlocal.em.split import TOLERANCE, Sharpened, Split
from emlocal.em.steps.adaptive_temperature import COLDEST, AdaptiveTemperature
from emlocal.em.steps.power import Power

NEWTON_TOLERANCE = 1e-9
MAX_ROUNDS = 100


def sharpen(split: Split, settings: AdaptiveTemperature) -> Sharpened | None:
    """Adaptive temperature on a split row; None where agreement with the reference cannot be promised."""
    before = split.entropy
    target = max(settings.ratio * before, settings.threshold)
    if before <= target:
        return split.untouched()
    low, high = 0.0, -math.log(COLDEST)  # of log β: H(low) > target ≥ H(high), if any
    x = min(high, 0.5)
    for _ in range(MAX_ROUNDS):
        H, variance, tail, S, bound = _tempered(split, math.exp(x))
        if target < H:
            low = x
        else:
            high = x
        newton = x + (H - target) / variance if variance > 0 else math.inf
        step = newton if low < newton < high else (low + high) / 2
        if abs(step - x) <= NEWTON_TOLERANCE or high - low <= NEWTON_TOLERANCE:
            break
        x = step
    beta = math.exp(x)
    if bound > TOLERANCE:
        return None
    return Sharpened(split.head * beta, 1.0, beta, tail, S, before, H, 1)


def raised(split: Split, settings: Power) -> Sharpened | None:
    """A power of a split row, which is a temperature that is known; None as in `sharpen`."""
    H, _, tail, S, bound = _tempered(split, settings.alpha)
    if bound > TOLERANCE:
        return None
    return Sharpened(split.head * settings.alpha, 1.0, settings.alpha, tail, S, split.entropy, H, 1)


def _tempered(split: Split, beta: float) -> tuple[float, float, float, float, float]:
    """H of w^β, the variance of β·s, the tail's mass, the partition, and the bound."""
    scaled = split.head * beta
    weights = np.exp(scaled)
    mean_s = split.tail_moment / split.tail_mass if split.tail_mass else 0.0
    lowest = split.tail_mass * math.exp((beta - 1) * mean_s)
    highest = split.tail_mass * math.exp((beta - 1) * math.log(split.cutoff))
    tail = (lowest + highest) / 2
    S = float(weights.sum()) + tail
    weighted = weights * scaled
    mean = (float(weighted.sum()) + tail * beta * mean_s) / S
    variance = (float(weighted @ scaled) + tail * (beta * mean_s) ** 2) / S - mean * mean
    H = max(0.0, math.log(S) - mean)
    width = (highest - lowest) / 2 / S
    delta_H = width * (1 + beta * abs(mean_s) + abs(math.log(S)))
    spread = math.sqrt(max(variance, 1e-30))
    return H, max(variance, 0.0), tail, S, width + delta_H / (2 * spread)


def hottest(settings: AdaptiveTemperature | Power) -> float:
    """The highest temperature that may follow: any."""
    return math.inf
