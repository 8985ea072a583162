r"""The fast ways of the EM steps: on a row split into head and tail, with a bound on the error.

Each way agrees with its step's reference or declines. It returns None where the bound exceeds `TOLERANCE`, or
where H lies so near δ that EM-INF's stopping is undecided. The caller then tries a smaller cutoff and finally
the reference.

Notation: weights w, exponents s = log w, partition S = Σ w, p = w/S, a = log p + H, gradient of the loss
g = −p·a (+ κ(p − p⁰)). A *tail* token has w ≤ cutoff, so log p ≤ log cutoff and a < 0: it only ever falls.

EM-INF by gradient descent
--------------------------
A tail token moves by u = Σ_t η p_t a_t, where p_t = w e^u / S_t. To first order in w,

    u = w·(A s + B),   A = Σ_t η/S_t,   B = Σ_t η (H_t − log S_t)/S_t.

Each step adds to |As + B|, since s + H_t − log S_t = a < 0. The KL term adds K = Σ_t ηκ(1/S_0 − 1/S_t), of
either sign, to B. So the tail's mass and first moment after any number of steps follow from
Q_k = Σ_tail w² s^k:

    Σ w e^u        ≈ M_0 + A Q_1 + (B+K) Q_0
    Σ w e^u (s+u)  ≈ M_1 + A (Q_2 + Q_1) + (B+K) (Q_1 + Q_0).

*The terms left out.* Let U = max|u| ≤ c·|A log c + B| at the cutoff c (w|As + B| grows with w there). The
second-order terms are ½Σwu² and Σwu²(1 + |s|/2) ≤ c·(1 + |log c|)·q with q = Σ w²(As + B)² a quadratic form
in the Q_k, and u itself is short by at most 2U·|u| (from e^u and from log p). With b_k = |A Q_{k+1} + B Q_k|
= Σ w²|As + B||s|^k the errors of log S and of (Σ w s)/S are at most

    ν = e^U (½ c q + 2 U b_0)/S   and   ν' = e^U (c (1 + |log c|) q + 2 U (b_0 + b_1))/S,

plus the float32 rounding of the sweep, `ROUNDING` of the tail's sums. The KL term's largest |K| adds c|K| to
U, |K| Σw²|s|^k to b_k and |K|(2 b_0 + |K| Q_0) to q.

*How the error spreads.* Let e be the error of the head's logits. The step's Jacobian is 1 + ηJ with
J = −∇²H = diag(p(a+1)) − (x yᵀ + y xᵀ), x = p(a+½), y = p. It is symmetric, so |e|₂ grows by at most the
larger of 1 + ηλ and −1 − ημ, where λ and μ bound the eigenvalues of J from above and below:

    λ = max(0, λ') + (|x||y| − x·y),   μ = μ'   (and κ/2 more on either side: the KL term's Jacobian).

With α² = |y|/|x|, u = αx + y/α and v = αx − y/α, J = diag(d) − (uuᵀ − vvᵀ)/2 and |v|²/2 = |x||y| − x·y. The
top token's row is held apart from the others (r the norm of the rest of u): λ' is the largest eigenvalue of
[[d₁ − u₁²/2, u₁r/2], [u₁r/2, d₂]], and μ' the smallest of the same with −e^(−H−2) − r²/2 for d₂, where d is
least. d = p(a+1) grows with p where it is positive, so d₂ ≤ its value at min(p₁, 1 − p₁). Each step adds
η(|p(a+1)|₂ ν + |p|₂ δH), δH = ν' + ν(1 + |Σ w s|/S), and `ROUNDING64` for the arithmetic of either side. If
the head is the whole row, that arithmetic is the only difference between the two, and ties that float64
breaks grow too.

*The effect on the distribution.* Σ p|e| ≤ |e|₂, so the head adds ≤ |e|₂/2 to the total variation, and giving
the tail one common factor adds ≤ 2b_0/S.

EM-INF by Adam
--------------
The first step is η·g/(|g| + ε). The tail moves too, all of it by nearly −η a step, since a tail token's
gradients are w·f_t(s) with f nearly constant in s, and Adam does not see the factor w while |g| ≫ ε = 1e-8.
So the tail is moved as one, by what Adam does to a token of the tail's mean exponent. How far other tail
tokens stray from it is measured, not assumed: *sentinels*, tokens of weight 0, take the same steps at the
cutoff and far below it, with ε = 0. The effect of ε itself: in k steps a token moves by −ηk(1 − f), f ≤
ε/(√v̂ + ε), so its weight exceeds the common one by at most w f (1 − e^{−ηk}) (e^x is convex; where the KL
term turns the tail round, the answer is None). The first of the k gradients alone gives √v̂ ≥ w|a|/(S_0 √k),
with |a| at least its first value at the cutoff. All of them give w|a|/(S e^{ηk/2}), less the KL term's share:
the weights shrink by e^{−η} a step at most, and a root mean square is no less than the geometric mean. So f ≤
ε'/(w + ε') with ε' = ε w/√v̂, and `light_tail_mass` sums w f.

In the head, an error δ of H makes the gradients err by p·δ, all with one sign. A token's own error e adds
p(a+1)e, which is how ties that rounding breaks grow. `_AdamTangent` carries both to first order through the
moments, so that a token near the sign change a = 0, where it matters, counts with its own error.

Adaptive temperature
--------------------
At β = 1/τ ≥ 1 a token's weight is w^β. The tail's mass is only known between two bounds,

    M_0 exp((β−1) s̄)  ≤  Σ_tail w^β  ≤  M_0 c^(β−1),

the lower by Jensen with the tail's mean exponent s̄, the upper since w ≤ c, the cutoff. Both shrink fast as β
grows. With Δ half the width between them over S, H is off by at most δH = Δ(1 + β|s̄| + |log S|). As
dH/d log β = −Var(β s), β is then off by a factor of 1 + δH/Var, which moves the distribution by at most
δH/(2√Var) in total variation, and the tail moves it by Δ.
"""

import math

import numpy as np

from emlocal.em.entropy import Float64
from emlocal.em.split import HIGHEST, ROUNDING, ROUNDING64, TOLERANCE, Sharpened, Split, SquaredTail
from emlocal.em.steps.adaptive_temperature import COLDEST, AdaptiveTemperature
from emlocal.em.steps.em_inf import BETA1, BETA2, EPSILON, Adam, EMInf
from emlocal.em.steps.power import Power

DOUBT = 1e-5
"""Nats; the error of the entropy by the float32 sweep is less."""
FAR_FROM_EPSILON = 1e12
"""A factor on a sentinel's gradient, which shows what ε = 0 would do: but for ε, Adam ignores the scale."""


def sharpen_em_inf(split: Split, settings: EMInf) -> Sharpened | None:
    """Takes the EM-INF step on a split row; returns None if agreement cannot be promised at this cutoff.

    Agreement is with the reference.
    """
    one_hot = len(split.head) == 1 and split.tail_mass == 0
    if one_hot or settings.steps == 0 or settings.threshold > split.entropy + DOUBT:
        return split.untouched()
    return (
        adam_descent(split, settings) if settings.optimizer == "adam" else gradient_descent(split, settings)
    )


def hottest_em_inf(settings: EMInf) -> float:
    """Returns the highest temperature that may follow EM-INF.

    The tail's tokens get a common factor. Their small mass hides the error until heat makes it large. Adam's
    steps are as large for rare tokens as for any; those of gradient descent are tiny.
    """
    return 1.0 if settings.optimizer == "adam" else 2.0


def gradient_descent(split: Split, settings: EMInf) -> Sharpened | None:
    """Takes the EM-INF step with optimizer "sgd"; returns None if agreement cannot be promised."""
    Q = split.squared_tail()
    eta, pull = settings.learning_rate, settings.learning_rate * settings.kl_weight
    n = len(split.head)
    top = int(split.head.argmax())  # stays the top without the KL term: its logit rises fastest
    h_and_1 = np.ones((2, n))  # one product gives Σ w h and Σ w
    h = h_and_1[0]
    h[:] = split.head
    w_and_g = np.empty((2, n))  # one product gives the three inner products that the bound needs
    weights, g = w_and_g
    p0 = np.exp(h) / split.partition if pull else None
    tail_mass, tail_moment = split.tail_mass, split.tail_moment
    A = B = K = largest_K = 0.0
    amplified = 0.0  # the size to which an error of 1 at every step would grow
    undecided = math.inf  # how near H came to δ
    least_S = split.partition
    for step in range(settings.steps + 1):
        np.exp(h, out=weights)
        moment, mass = (h_and_1 @ weights).tolist()
        S = mass + tail_mass
        log_S = math.log(S)
        H = max(0.0, log_S - (moment + tail_moment) / S)
        least_S = min(least_S, S)
        undecided = min(undecided, abs(H - settings.threshold))
        if settings.threshold > H or step == settings.steps:
            break
        rate, c = eta / S, H - log_S
        np.add(h, c, out=g)
        g *= weights  # S·p·a
        gram = (w_and_g @ w_and_g.T).tolist()
        high, low = _curvature(float(weights[top]) / S, H, gram, S)
        amplified *= max(1 + eta * high + pull / 2, pull / 2 - eta * low - 1)
        amplified += 1
        A += rate
        B += rate * c
        g *= rate
        h += g
        if p0 is not None:
            h += pull * (p0 - weights / S)
            K += pull * (1 / split.partition - 1 / S)
            largest_K = max(largest_K, abs(K))
            top = int(h.argmax())
        tail_mass = split.tail_mass + A * Q.Q1 + (B + K) * Q.Q0
        tail_moment = split.tail_moment + A * (Q.Q2 + Q.Q1) + (B + K) * (Q.Q1 + Q.Q0)
        if h[top] > HIGHEST or tail_mass < 0:  # steps far beyond the expansion's reach
            return None

    nu, delta_H, tail_tv = _left_out(split, Q, A, B, largest_K, least_S)
    error = amplified * (eta * (nu + delta_H) + ROUNDING64 * (1 + eta + pull))
    log_V = math.log(len(split.row))
    in_doubt = settings.threshold > 0 and undecided <= delta_H + error * (1 + log_V) + 1e-12
    if in_doubt or error / 2 + tail_tv > TOLERANCE:
        return None
    factor = tail_mass / split.tail_mass if split.tail_mass else 1.0
    return Sharpened(h, factor, 1.0, tail_mass, S, split.entropy, H, step)


def _left_out(
    split: Split, Q: SquaredTail, A: float, B: float, K: float, S: float
) -> tuple[float, float, float]:
    """Returns bounds on the errors of log S and of H, and on the tail's share of the total variation.

    |As + B| grows over the steps: with the last A and B, the largest K ≥ 0 and the least S, the bounds hold
    for every step.
    """
    c, log_c = split.cutoff, math.log(split.cutoff)
    U = c * (abs(A * log_c + B) + K)
    b0, b1 = abs(A * Q.Q1 + B * Q.Q0), abs(A * Q.Q2 + B * Q.Q1)
    q = A * A * Q.Q2 + 2 * A * B * Q.Q1 + B * B * Q.Q0 + K * (2 * b0 + K * Q.Q0)
    b0, b1 = b0 + K * Q.Q0, b1 - K * Q.Q1
    nu = math.exp(min(U, 50)) * (c * q / 2 + 2 * U * b0) / S + ROUNDING * split.tail_mass / S
    nu_moment = math.exp(min(U, 50)) * (c * (1 - log_c) * q + 2 * U * (b0 + b1)) / S
    nu_moment += ROUNDING * abs(split.tail_moment) / S
    return nu, nu_moment + nu * (1 + 2 * math.log(len(split.row))), 2 * b0 / S


def _curvature(p1: float, H: float, gram: list[list[float]], S: float) -> tuple[float, float]:
    """Returns λ and μ, which bound the curvature of −H from above and below, without the KL term's share.

    Args:
        p1: probability of the top token.
        gram: inner products of S·p and S·p·a over the head.
    """
    pp, pg, gg = gram[0][0] / S**2, gram[0][1] / S**2, gram[1][1] / S**2
    a1 = math.log(p1) + H
    d1, x1 = p1 * (a1 + 1), p1 * (a1 + 0.5)
    p2 = min(p1, 1 - p1)
    d2 = max(0.0, p2 * (math.log(p2) + H + 1)) if p2 > 0 else 0.0
    xy, norms = pg + pp / 2, math.sqrt(max(0.0, gg + pg + pp / 4) * pp)
    alpha = math.sqrt(pp / norms) if norms else 1.0  # √(|y|/|x|)
    u1 = alpha * x1 + p1 / alpha
    rest = math.sqrt(max(0.0, 2 * (norms + xy) - u1 * u1))
    top, coupling = d1 - u1 * u1 / 2, u1 * rest
    other = -math.exp(-H - 2) - rest * rest / 2
    high = (top + d2 + math.hypot(top - d2, coupling)) / 2
    low = (top + other - math.hypot(top - other, coupling)) / 2
    return max(0.0, high) + norms - xy, low


def adam_descent(split: Split, settings: EMInf) -> Sharpened | None:
    """Takes the EM-INF step with optimizer "adam"; returns None if agreement cannot be promised."""
    n = len(split.head)
    sentinels = _sentinels(split)
    h = np.concatenate((split.head, sentinels))
    weights0 = np.exp(h)
    adam = Adam(h.shape, settings.learning_rate)
    tail_mass, tail_moment = split.tail_mass, split.tail_moment
    # the tail's sums are off by the float32 sweep, and by the tokens that stray from the common shift
    depth = abs(tail_moment / tail_mass) if tail_mass else 0.0
    tangent, off = _AdamTangent(h.shape), np.zeros(h.shape)
    shift = 0.0
    for step in range(settings.steps + 1):
        weights = np.exp(h)
        S = float(weights[:n].sum()) + tail_mass
        H = max(0.0, math.log(S) - (float(weights[:n] @ h[:n]) + tail_moment) / S)
        p = weights / S
        # a token moves by little more than η a step
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
        if h.max() > HIGHEST:  # steps far beyond any sensible setting
            return None
        shift = max(float(h[n] - sentinels[0]), -HIGHEST)
        tail_mass = split.tail_mass * math.exp(shift)
        tail_moment = math.exp(shift) * (split.tail_moment + shift * split.tail_mass)
    raise AssertionError("the loop returns at its last round")


class _AdamTangent:
    """The error of Adam's update u = m̂/√v̂, to first order, from errors dg of its gradients."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean = np.zeros(shape)
        self.square = np.zeros(shape)

    def step(self, adam: Adam, gradient: Float64, dg: Float64) -> Float64:
        """Returns du = (dm̂ − u·dv̂/(2√v̂))/√v̂, after `adam` has taken the same step."""
        self.mean += (1 - BETA1) * (dg - self.mean)
        self.square += (1 - BETA2) * (2 * gradient * dg - self.square)
        rms = adam.root_mean_square() + EPSILON
        u = adam.mean / (1 - BETA1**adam.steps) / rms
        change: Float64 = (
            self.mean / (1 - BETA1**adam.steps) - u * self.square / (1 - BETA2**adam.steps) / (2 * rms)
        ) / rms
        return change


def _sentinels(split: Split) -> Float64:
    """Returns the exponents of the tail tokens that are watched: its mean, its top, and far below."""
    top = math.log(split.cutoff)
    mean = split.tail_moment / split.tail_mass if split.tail_mass else top
    return np.array([mean, top, 2 * top])


def _stray(split: Split, moved: Float64, S: float, settings: EMInf, step: int) -> float:
    """Returns how much probability the tail's common shift may misplace after `step` Adam steps."""
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


NEWTON_TOLERANCE = 1e-9
MAX_ROUNDS = 100


def sharpen_adaptive_temperature(split: Split, settings: AdaptiveTemperature) -> Sharpened | None:
    """Takes the adaptive-temperature step on a split row.

    Returns None if agreement with the reference cannot be promised at this cutoff.
    """
    before = split.entropy
    target = max(settings.ratio * before, settings.threshold)
    if before <= target:
        return split.untouched()
    low, high = 0.0, -math.log(COLDEST)  # bounds of log β: H(low) > target ≥ H(high), if any
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


def raise_to_power(split: Split, settings: Power) -> Sharpened | None:
    """Takes the power step on a split row; returns None if agreement cannot be promised at this cutoff.

    The step is a temperature that is known, so the bound is that of adaptive temperature.
    """
    H, _, tail, S, bound = _tempered(split, settings.alpha)
    if bound > TOLERANCE:
        return None
    return Sharpened(split.head * settings.alpha, 1.0, settings.alpha, tail, S, split.entropy, H, 1)


def _tempered(split: Split, beta: float) -> tuple[float, float, float, float, float]:
    """Returns H of w^β, the variance of β·s, the tail's mass, the partition, and the bound."""
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


def hottest_adaptive_temperature(settings: AdaptiveTemperature | Power) -> float:
    """Returns the highest temperature that may follow adaptive temperature or power: any."""
    return math.inf
