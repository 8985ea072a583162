"""Adaptive temperature: cool each row until its entropy is low enough (paper §4, the baseline of EM-INF).

The largest τ ≤ 1 with H(softmax(z/τ)) ≤ max(α·H₀, δ). Among all q with H(q) ≤ c the one nearest to p in
KL(q ‖ p) is a tempered p, so this is the exact entropy projection of p; EM-INF is a gradient path to the
same goal in another geometry. H grows with τ (dH/d log τ = Var_q(z)/τ² ≥ 0), so bisection finds τ.

The tolerance is on log τ: the authors' 0.1 nats of entropy is more than a confident token's whole entropy.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

from emlocal.em.em_inf import EMResult
from emlocal.em.entropy import Float64, checked, entropy
from emlocal.settings import AdaptiveTemperature

TOLERANCE = 1e-7
"""Relative: the τ returned is within this factor of the largest τ that qualifies."""
COLDEST = 1e-6
"""No colder: ties for the top stay ties at any τ > 0, so a row may have no τ that qualifies."""


def adaptive_temperature(logits: ArrayLike, settings: AdaptiveTemperature) -> EMResult:
    """Temper each row by itself; shapes and errors as in `em_inf`.

    Where no τ ≥ COLDEST reaches the target (ties for the top), τ = COLDEST: uniform over the ties.
    """
    z = checked(logits)
    z = z - z.max(axis=-1, keepdims=True)
    before = entropy(z)
    target = np.maximum(settings.ratio * before, settings.threshold)
    tau = np.ones_like(before)
    for i in np.ndindex(before.shape):
        tau[i] = _largest_temperature(z[i], float(target[i])) if before[i] > target[i] else 1.0
    # exp(−inf) is the only thing that a masked token needs, and −inf/τ is −inf
    tempered = z / tau[..., None]
    return EMResult(tempered, before, entropy(tempered), (tau < 1).astype(np.int64))


def _largest_temperature(z: Float64, target: float) -> float:
    low, high = math.log(COLDEST), 0.0
    if float(entropy(z / COLDEST)) > target:
        return COLDEST
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        if float(entropy(z / math.exp(middle))) <= target:
            low = middle
        else:
            high = middle
    return math.exp(low)
