r"""EM-INF by Adam on a split row, with a bound on its distance from the reference.

Notation as in `gradient_descent`.

The first step is η·g/(|g| + ε): the tail moves too, all of it by nearly −η a step, since a tail
token's gradients are w·f_t(s) with f nearly constant in s, and Adam does not see the factor w while
|g| ≫ ε = 1e-8. So the tail is moved as one, by what Adam does to a token of the tail's mean exponent. How
far other tail tokens stray from it is measured, not assumed: *sentinels*, tokens of weight 0, take the same
steps at the cutoff and far below it, with ε = 0. What ε itself does: in k steps a token moves by
−ηk(1 − f), f ≤ ε/(√v̂ + ε), so its weight exceeds the common one by at most w f (1 − e^{−ηk}) (e^x is
convex; where the KL term turns the tail round, the answer is None). The first of the k gradients alone gives
√v̂ ≥ w|a|/(S_0 √k), with |a| at least its first value at the cutoff. All of them give w|a|/(S e^{ηk/2}), less
the KL term's share: the weights shrink by e^{−η} a step at most, and a root mean square is no less than the
geometric mean. So f ≤ ε'/(w + ε') with ε' = ε w/√v̂, and `light_tail_mass` sums w f.

In the head, an error δ of H makes the gradients err by p·δ, all with one sign, and a token's own error e by
p(a+1)e more, which is how ties that rounding breaks come to grow. `_AdamTangent` carries both to first order
through the moments, so that a token near the sign change a = 0, where it matters, is counted for what it is.
"""

import math

import numpy as np

from emlocal.em.em_inf import BETA1, BETA2, EPSILON, Adam
from emlocal.em.entropy import Float64
from emlocal.em.split import HIGHEST, ROUNDING, ROUNDING64, TOLERANCE, Sharpened, Split
from emlocal.settings import EMInf

FAR_FROM_EPSILON = 1e12
"""Adam ignores the gradient's scale but for ε; scaled by this, a sentinel shows what ε = 0 would do."""


def adam_descent(split: Split, settings: EMInf) -> Sharpened | None:
    """EM-INF with optimizer "adam"; None where agreement with the reference cannot be promised."""
    n = len(split.head)
    sentinels = _sentinels(split)
    h = np.concatenate((split.head, sentinels))
    weights0 = np.exp(h)
    adam = Adam(h.shape, settings.learning_rate)
    tail_mass, tail_moment = split.tail_mass, split.tail_moment
    # the tail's sums are off by the float32 sweep, and by what strays from the common shift
    depth = abs(tail_moment / tail_mass) if tail_mass else 0.0
    tangent, off = _AdamTangent(h.shape), np.zeros(h.shape)
    shift = 0.0
    for step in range(settings.steps + 1):
        weights = np.exp(h)
        S = float(weights[:n].sum()) + tail_mass
        H = max(0.0, math.log(S) - (float(weights[:n] @ h[:n]) + tail_moment) / S)
        p = weights / S
        # nothing moves by much more than η a step
        error = float(p[:n] @ np.minimum(np.abs(off[:n]), 2 * settings.learning_rate * step))
        stray = _stray(split, h[n:] - sentinels, S, settings, step)
        delta = (stray + ROUNDING * tail_mass / S) * (2 + depth + H) + error * (1 + H)
        undecided = settings.threshold > 0 and abs(H - settings.threshold) <= delta + 1e-12
        if undecided or error + stray > TOLERANCE:
            return None
        if settings.threshold > H or step == settings.steps:
            return Sharpened(h[:n], math.exp(shift), 1.0, tail_mass, S, split.entropy, H, step)

        a = h + (H - math.log(S))
        gradient = -p * a
        if settings.kl_weight:
            gradient += settings.kl_weight * (p - weights0 / split.partition)
        if gradient[n:].min() < 0:  # the KL term turns the tail round
            return None
        gradient[n:] *= FAR_FROM_EPSILON
        h = h - adam.step(gradient)
        dg = p * (delta + ROUNDING64 + np.abs((a + (1 - settings.kl_weight)) * off))
        off += settings.learning_rate * tangent.step(adam, gradient, dg)
        if h.max() > HIGHEST:  # steps far beyond what anybody means
            return None
        shift = max(float(h[n] - sentinels[0]), -HIGHEST)
        tail_mass = split.tail_mass * math.exp(shift)
        tail_moment = math.exp(shift) * (split.tail_moment + shift * split.tail_mass)
    raise AssertionError("the loop returns at its last round")


class _AdamTangent:
    """How far Adam's update u = m̂/√v̂ moves, to first order, when its gradients are off by dg."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean = np.zeros(shape)
        self.square = np.zeros(shape)

    def step(self, adam: Adam, gradient: Float64, dg: Float64) -> Float64:
        """du = (dm̂ − u·dv̂/(2√v̂))/√v̂, after `adam` has taken the same step."""
        self.mean += (1 - BETA1) * (dg - self.mean)
        self.square += (1 - BETA2) * (2 * gradient * dg - self.square)
        rms = adam.root_mean_square() + EPSILON
        u = adam.mean / (1 - BETA1**adam.steps) / rms
        change: Float64 = (
            self.mean / (1 - BETA1**adam.steps) - u * self.square / (1 - BETA2**adam.steps) / (2 * rms)
        ) / rms
        return change


def _sentinels(split: Split) -> Float64:
    """Exponents of the tail tokens that are watched: its mean, its top, and far below."""
    top = math.log(split.cutoff)
    mean = split.tail_moment / split.tail_mass if split.tail_mass else top
    return np.array([mean, top, 2 * top])


def _stray(split: Split, moved: Float64, S: float, settings: EMInf, step: int) -> float:
    """How much probability the tail's common shift may put in the wrong place after `step` Adam steps."""
    if step == 0 or not split.tail_mass:
        return 0.0
    spread = min(float(np.abs(moved[1:] - moved[0]).max()), 1.0)
    a = abs(math.log(split.cutoff) - math.log(split.partition) + split.entropy)
    reach = settings.learning_rate * step
    weakest = split.partition * math.sqrt(step) / a  # w/√v̂ at most, from the first gradient …
    pulled = a - settings.kl_weight * (S * math.exp(min(reach, 50.0)) / split.partition - 1)
    if pulled > 0:  # … or from all of them
        weakest = min(weakest, S * math.exp(min(reach, 50.0) / 2) / min(a, pulled))
    light = split.light_tail_mass(EPSILON * weakest)
    return (split.tail_mass * math.expm1(spread) + light * -math.expm1(-reach)) / S
