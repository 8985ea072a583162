r"""Gradient steps of EM-INF on a split row, with a bound on the distance from the full-vocabulary reference.

Notation: weights w, exponents s = log w, partition S = Σ w, p = w/S, a = log p + H, gradient of the loss
g = −p·a (+ κ(p − p⁰)). A *tail* token has w ≤ cutoff, so log p ≤ log cutoff and a < 0: it only ever falls.

**Gradient descent.** A tail token moves by u = Σ_t η p_t a_t, where p_t = w e^u / S_t. To first order in w,

    u = w·(A s + B),   A = Σ_t η/S_t,   B = Σ_t η (H_t − log S_t)/S_t  (+ Σ_t ηκ(1/S_0 − 1/S_t)),

so the tail's mass and first moment after any number of steps follow from Q_k = Σ_tail w² s^k:

    Σ w e^u        ≈ M_0 + A Q_1 + B Q_0
    Σ w e^u (s+u)  ≈ M_1 + A (Q_2 + Q_1) + B (Q_1 + Q_0).

*What is left out.* Let U = max|u| ≤ c·|A log c + B| at the cutoff c (w|As + B| grows with w there). The
second-order terms are ½Σwu² and Σwu²(1 + |s|/2) ≤ c·(1 + |log c|)·q with q = Σ w²(As + B)² a quadratic form
in the Q_k, and u itself is short by at most 2U·|u| (from e^u and from log p). With b_k = |A Q_{k+1} + B Q_k|
= Σ w²|As + B||s|^k the errors of log S and of (Σ w s)/S are at most

    ν = e^U (½ c q + 2 U b_0)/S   and   ν' = e^U (c (1 + |log c|) q + 2 U (b_0 + b_1))/S,

plus the float32 rounding of the sweep, `ROUNDING` of the tail's sums.

*How it spreads.* Let e be the error of the head's logits. The step is z ← z + η J-symmetric map with Jacobian
J = −∇²H = diag(p(a+1)) − (x yᵀ + y xᵀ), x = p(a+½), y = p: symmetric, so |e|₂ grows by at most 1 + ηλ with

    λ ≤ max_i p_i(a_i + 1) + (|x||y| − x·y)   (+ κ/2 for the KL term, whose Jacobian has norm ≤ ½),

and each step adds η(|p(a+1)|₂ ν + |p|₂ δH), δH = ν' + ν(1 + |Σ w s|/S).

*What it means.* Σ p|e| ≤ |e|₂, so the head adds ≤ |e|₂/2 to the total variation, and giving the tail one
common factor adds ≤ 2b_0/S.

**Adam.** The first step is η·g/(|g| + ε): the tail moves too, all of it by nearly −η a step, since a tail
token's gradients are w·f_t(s) with f nearly constant in s, and Adam does not see the factor w while
|g| ≫ ε = 1e-8. So the tail is moved as one, by what Adam does to a token of the tail's mean exponent. How
far other tail tokens stray from it is measured, not assumed: *sentinels*, tokens of weight 0, take the same
steps at the cutoff and far below it, with ε = 0. What ε itself does: a token with constant gradient g moves
by −ηk(1 − f), f = ε/(|g| + ε), so its weight exceeds the common one by at most w f (1 − e^{−ηk}) (e^x is
convex). |g| = w|a|/S with |a| at least its value at the cutoff; over the steps the gradients shrink by e^{−η}
each, and their root mean square is no less than their geometric mean: f ≤ ε'/(w + ε') with
ε' = ε S e^{ηk/2}/|a|, and `light_tail_mass` sums w f. In the head, an error δ of H makes the gradients err
by p·δ, all with one sign; `_AdamTangent` carries that to first order through the moments, so that a token
near the sign change a = 0, where it matters, is counted for what it is.

Where the bound exceeds `TOLERANCE`, or H lies so near δ that stopping is undecided, the caller tries a
narrower cutoff and then the reference.
"""

import math
from typing import NamedTuple

import numpy as np

from emlocal.em.em_inf import BETA1, BETA2, EPSILON, Adam
from emlocal.em.entropy import Float64
from emlocal.em.split import Split, SquaredTail
from emlocal.settings import EMInf

TOLERANCE = 9e-6
"""The largest bound on the total variation that is accepted; the contract is 1e-5."""
ROUNDING = 5e-7
"""Relative error of the tail's float32 sums: 2.5 ulp in exp, and sums of 128."""
FAR_FROM_EPSILON = 1e12
"""Adam ignores the gradient's scale but for ε; scaled by this, a sentinel shows what ε = 0 would do."""


class Sharpened(NamedTuple):
    """A split row after EM."""

    head: Float64
    """New exponents of the head, [n]."""
    tail_factor: float
    tail_power: float
    """A tail token's new weight is tail_factor · w^tail_power …"""
    tail_mass: float
    """… and this is their sum."""
    entropy_before: float
    entropy_after: float
    steps: int


class _State(NamedTuple):
    """The distribution between two steps."""

    weights: Float64
    S: float
    H: float


def descend(split: Split, settings: EMInf) -> Sharpened | None:
    """EM-INF on a split row; None where agreement with the reference cannot be promised."""
    H = split.entropy()
    if settings.steps == 0 or settings.threshold > H + 1e-6:
        return Sharpened(split.head, 1.0, 1.0, split.tail_mass, H, H, 0)
    if settings.optimizer == "adam":
        return _adam(split, settings)
    return _gradient_descent(split, settings)


def _state(head: Float64, tail_mass: float, tail_moment: float) -> _State:
    weights = np.exp(head)
    S = float(weights.sum()) + tail_mass
    H = math.log(S) - (float(weights @ head) + tail_moment) / S
    return _State(weights, S, max(0.0, H))


def _gradient_descent(split: Split, settings: EMInf) -> Sharpened | None:
    Q = split.squared_tail()
    h = split.head.copy()
    p0 = np.exp(h) / split.partition if settings.kl_weight else None
    tail_mass, tail_moment = split.tail_mass, split.tail_moment
    A = B = error = before = first_S = 0.0
    for step in range(settings.steps + 1):
        state = _state(h, tail_mass, tail_moment)
        weights, S, H = state
        if step == 0:
            before, first_S = H, S
        nu, delta_H, tail_tv = _left_out(split, Q, A, B, S, H)
        margin = delta_H + error * (1 + math.log(len(h) + 1)) + 1e-12
        if abs(H - settings.threshold) <= margin or error / 2 + tail_tv > TOLERANCE:
            return None
        if settings.threshold > H or step == settings.steps:
            factor = tail_mass / split.tail_mass if split.tail_mass else 1.0
            return Sharpened(h, factor, 1.0, tail_mass, before, H, step)

        rate = settings.learning_rate / S
        c = H - math.log(S)
        g = h + c
        g *= weights  # S·p·a
        error = error * (1 + settings.learning_rate * _growth(weights, g, S, settings.kl_weight))
        error += settings.learning_rate * (nu + delta_H)
        A += rate
        B += rate * c
        g *= rate
        h += g
        if p0 is not None:
            pull = settings.learning_rate * settings.kl_weight
            h += pull * (p0 - weights / S)
            B += pull * (1 / first_S - 1 / S)
        tail_mass = split.tail_mass + A * Q.Q1 + B * Q.Q0
        tail_moment = split.tail_moment + A * (Q.Q2 + Q.Q1) + B * (Q.Q1 + Q.Q0)
    raise AssertionError("the loop returns at its last round")


def _left_out(
    split: Split, Q: SquaredTail, A: float, B: float, S: float, H: float
) -> tuple[float, float, float]:
    """Bounds on the errors of log S and of H, and on the tail's share of the total variation."""
    c, log_c = split.cutoff, math.log(split.cutoff)
    U = c * abs(A * log_c + B)
    q = A * A * Q.Q2 + 2 * A * B * Q.Q1 + B * B * Q.Q0
    b0, b1 = abs(A * Q.Q1 + B * Q.Q0), abs(A * Q.Q2 + B * Q.Q1)
    nu = math.exp(U) * (c * q / 2 + 2 * U * b0) / S + ROUNDING * split.tail_mass / S
    nu_moment = math.exp(U) * (c * (1 - log_c) * q + 2 * U * (b0 + b1)) / S
    nu_moment += ROUNDING * abs(split.tail_moment) / S
    return nu, nu_moment + nu * (1 + abs(math.log(S) - H)), 2 * b0 / S


def _growth(weights: Float64, g: Float64, S: float, kl_weight: float) -> float:
    """λ, the largest rate at which gradient descent can amplify an error of the head. g is S·p·a."""
    diagonal = (g + weights) / S  # p(a+1)
    i = int(diagonal.argmax())
    d1, x1, y1 = float(diagonal[i]), float(g[i] + weights[i] / 2) / S, float(weights[i]) / S
    diagonal[i] = -math.inf
    d2 = max(0.0, float(diagonal.max())) if len(diagonal) > 1 else 0.0

    pp, pg, gg = (float(v) / S**2 for v in (weights @ weights, weights @ g, g @ g))
    xy, norms = pg + pp / 2, math.sqrt(max(0.0, gg + pg + pp / 4) * pp)
    alpha = math.sqrt(pp / norms) if norms else 1.0  # √(|y|/|x|)
    u1 = alpha * x1 + y1 / alpha
    rest = math.sqrt(max(0.0, 2 * (norms + xy) - u1 * u1))
    top, coupling = d1 - u1 * u1 / 2, u1 * rest / 2
    block = (top + d2 + math.hypot(top - d2, 2 * coupling)) / 2
    return max(0.0, block) + norms - xy + kl_weight / 2


def _adam(split: Split, settings: EMInf) -> Sharpened | None:
    n = len(split.head)
    sentinels = _sentinels(split)
    h = np.concatenate((split.head, sentinels))
    weights0 = np.exp(h)
    first_S = split.partition
    adam = Adam(h.shape, settings.learning_rate)
    tail_mass, tail_moment = split.tail_mass, split.tail_moment
    # the tail's sums are off by the float32 sweep, and by what strays from the common shift
    depth = abs(tail_moment / tail_mass) if tail_mass else 0.0
    tangent, off = _AdamTangent(h.shape), np.zeros(h.shape)
    error = before = shift = 0.0
    for step in range(settings.steps + 1):
        weights = np.exp(h)
        S = float(weights[:n].sum()) + tail_mass
        H = max(0.0, math.log(S) - (float(weights[:n] @ h[:n]) + tail_moment) / S)
        if step == 0:
            before = H
        stray = _stray(split, h[n:] - sentinels, S, H, settings, step)
        delta = (stray + ROUNDING * tail_mass / S) * (2 + depth + H) + error * (1 + H)
        if abs(H - settings.threshold) <= delta + 1e-12 or error + stray > TOLERANCE:
            return None
        if settings.threshold > H or step == settings.steps:
            return Sharpened(h[:n], math.exp(shift), 1.0, tail_mass, before, H, step)

        p = weights / S
        gradient = -p * (h + (H - math.log(S)))
        if settings.kl_weight:
            gradient += settings.kl_weight * (p - weights0 / first_S)
        gradient[n:] *= FAR_FROM_EPSILON
        h = h - adam.step(gradient)
        off += settings.learning_rate * tangent.step(adam, gradient, p * delta)
        error = float(p[:n] @ np.minimum(np.abs(off[:n]), 2 * settings.learning_rate * (step + 1)))
        shift = float(h[n] - sentinels[0])
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


def _stray(split: Split, moved: Float64, S: float, H: float, settings: EMInf, step: int) -> float:
    """How much probability the tail's common shift may put in the wrong place after `step` Adam steps."""
    if step == 0 or not split.tail_mass:
        return 0.0
    spread = float(np.abs(moved[1:] - moved[0]).max())
    reach = min(settings.learning_rate * step, 50.0)
    a = abs(math.log(split.cutoff) - math.log(S) + H)
    still = split.light_tail_mass(EPSILON * S * math.exp(reach / 2) / max(a, 1e-3))
    return (split.tail_mass * math.expm1(spread) + still * -math.expm1(-reach)) / S
