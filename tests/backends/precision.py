"""Error bounds of an Adam step in float32: how far its logits may be from the float64 reference's.

Adam divides a token's gradient by its own size: u = m̂/(√v̂ + ε). So a token moves by η however small its
gradient is, and a relative error of the gradient becomes an error of the step. With g = −p·a + κ(p − p⁰) and
a = log p + H, float32's a is off by

    δ = ROUNDING · (1 + |log p| + H),

plus the effect of the errors e of the logits so far: Σ p (|a| + e) e on H, and |a + 1 − κ| e on the token
itself. So g_t is off by dg_t = p (δ + Σ p (|a| + e) e + |a + 1 − κ| e), and u, to first order, by

    du = Σ_t |w_t/(√v̂ + ε) − m̂ v_t g_t/(√v̂ (√v̂ + ε)²)| dg_t,

with w_t and v_t the shares of step t's gradient in m̂ and v̂. If dg_t > |g_t|/2, even the sign is in doubt,
and du is 2. A step adds η du to e.

On rows of models this changes the entropy by at most 1e-6. On a nearly flat row, |a| is at most the spread of
its logits, and g = p·a comes near ε. With a spread of 1e-4, dg/g is a hundredth, and some tokens cannot be
told from the mean. After em-pt's three steps of 0.1 on some hundred such tokens, the bound on the entropy is
0.02 nats; errors up to 3e-4 were seen. Tokens closer than 1e-6 may go either way, by 2η a step.
"""

import numpy as np
from numpy.typing import NDArray

from emlocal.em.entropy import Float64, entropy, finite, log_softmax
from emlocal.em.steps.em_inf import BETA1, BETA2, EPSILON, Adam, EMInf

ROUNDING = 4 * 2.0**-24
"""Relative error of log p and H: a few roundings of float32."""


def adam_in_float32(row: NDArray[np.float32], settings: EMInf) -> tuple[float, float]:
    """Returns bounds on the error of the entropy after the step, in nats, and on the total variation."""
    z = row.astype(np.float64)
    z -= z.max()
    p0 = np.exp(log_softmax(z))
    adam = Adam(z.shape, settings.learning_rate)
    gradients: list[Float64] = []
    errors: list[Float64] = []
    e = np.zeros(z.shape)
    for step in range(1, settings.steps + 1):
        log_p, H = finite(log_softmax(z)), float(entropy(z))
        if settings.threshold >= H:
            break
        p = np.exp(log_softmax(z))
        a = log_p + H
        delta = ROUNDING * (1 + np.abs(log_p) + H) + _of_entropy(p, a, e)
        gradients.append(-p * a + settings.kl_weight * (p - p0))
        errors.append(p * (delta + np.abs(a + 1 - settings.kl_weight) * e))
        z = z - adam.step(gradients[-1])
        g, dg, ages = np.array(gradients), np.array(errors), np.arange(step)[::-1, None]
        w = (1 - BETA1) * BETA1**ages / (1 - BETA1**step)
        v = (1 - BETA2) * BETA2**ages / (1 - BETA2**step)
        mean, rms = (w * g).sum(axis=0), adam.root_mean_square()
        with np.errstate(all="ignore"):  # masked tokens: 0/0
            slope = w / (rms + EPSILON) - np.nan_to_num(mean * v * g / rms) / (rms + EPSILON) ** 2
        du = np.minimum((np.abs(slope) * dg).sum(axis=0), 2.0)
        du[(dg > np.abs(g) / 2).any(axis=0)] = 2.0
        e = e + settings.learning_rate * np.where(p > 0, du, 0.0)
    log_p, p, H = finite(log_softmax(z)), np.exp(log_softmax(z)), float(entropy(z))
    return _of_entropy(p, log_p + H, e), float(p @ np.minimum(e, 1.0))


def _of_entropy(p: Float64, a: Float64, e: Float64) -> float:
    """Returns the effect on H of errors e in the logits.

    Its slope is −p·a, and the second order is at most Σ p e².
    """
    return float(p @ ((np.abs(a) + e) * e))
