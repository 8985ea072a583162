r"""EM-INF by gradient descent on a split row, with a bound on its distance from the reference.

Notation: weights w, exponents s = log w, partition S = Σ w, p = w/S, a = log p + H, gradient of the loss
g = −p·a (+ κ(p − p⁰)). A *tail* token has w ≤ cutoff, so log p ≤ log cutoff and a < 0: it only ever falls.

A tail token moves by u = Σ_t η p_t a_t, where p_t = w e^u / S_t. To first order in w,

    u = w·(A s + B),   A = Σ_t η/S_t,   B = Σ_t η (H_t − log S_t)/S_t,

each step adding to |As + B|, since s + H_t − log S_t = a < 0. The KL term adds K = Σ_t ηκ(1/S_0 − 1/S_t), of
either sign, to B. So the tail's mass and first moment after any number of steps follow from
Q_k = Σ_tail w² s^k:

    Σ w e^u        ≈ M_0 + A Q_1 + (B+K) Q_0
    Σ w e^u (s+u)  ≈ M_1 + A (Q_2 + Q_1) + (B+K) (Q_1 + Q_0).

*What is left out.* Let U = max|u| ≤ c·|A log c + B| at the cutoff c (w|As + B| grows with w there). The
second-order terms are ½Σwu² and Σwu²(1 + |s|/2) ≤ c·(1 + |log c|)·q with q = Σ w²(As + B)² a quadratic form
in the Q_k, and u itself is short by at most 2U·|u| (from e^u and from log p). With b_k = |A Q_{k+1} + B Q_k|
= Σ w²|As + B||s|^k the errors of log S and of (Σ w s)/S are at most

    ν = e^U (½ c q + 2 U b_0)/S   and   ν' = e^U (c (1 + |log c|) q + 2 U (b_0 + b_1))/S,

plus the float32 rounding of the sweep, `ROUNDING` of the tail's sums. The KL term's largest |K| adds c|K| to
U, |K| Σw²|s|^k to b_k and |K|(2 b_0 + |K| Q_0) to q.

*How it spreads.* Let e be the error of the head's logits. The step's Jacobian is 1 + ηJ with
J = −∇²H = diag(p(a+1)) − (x yᵀ + y xᵀ), x = p(a+½), y = p: symmetric, so |e|₂ grows by at most the larger of
1 + ηλ and −1 − ημ, where λ and μ bound the eigenvalues of J from above and below:

    λ = max(0, λ') + (|x||y| − x·y),   μ = μ'   (and κ/2 more on either side: the KL term's Jacobian).

With α² = |y|/|x|, u = αx + y/α and v = αx − y/α, J = diag(d) − (uuᵀ − vvᵀ)/2 and |v|²/2 = |x||y| − x·y. The
top token's row is held apart from the others (r the norm of the rest of u): λ' is the largest eigenvalue of
[[d₁ − u₁²/2, u₁r/2], [u₁r/2, d₂]], and μ' the smallest of the same with −e^(−H−2) − r²/2 for d₂, where d is
least. d = p(a+1) grows with p where it is positive, so d₂ ≤ its value at min(p₁, 1 − p₁). Each step adds
η(|p(a+1)|₂ ν + |p|₂ δH), δH = ν' + ν(1 + |Σ w s|/S), and `ROUNDING64` for the arithmetic of either side:
nothing else separates the two where the head is the whole row, and ties that float64 breaks grow too.

*What it means.* Σ p|e| ≤ |e|₂, so the head adds ≤ |e|₂/2 to the total variation, and giving the tail one
common factor adds ≤ 2b_0/S.

Where the bound exceeds `TOLERANCE`, or H lies so near δ that stopping is undecided, the answer is None; the
caller tries a narrower cutoff and then the reference.
"""

import math

import numpy as np

from emlocal.em.split import HIGHEST, ROUNDING, ROUNDING64, TOLERANCE, Sharpened, Split, SquaredTail
from emlocal.settings import EMInf


def gradient_descent(split: Split, settings: EMInf) -> Sharpened | None:
    """EM-INF with optimizer "sgd"; None where agreement with the reference cannot be promised."""
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
    amplified = 0.0  # what an error of 1 at every step would grow to
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
        if h[top] > HIGHEST or tail_mass < 0:  # steps far beyond what the expansion can follow
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
    """Bounds on the errors of log S and of H, and on the tail's share of the total variation.

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
    """λ and μ, between which the curvature of −H lies; the KL term's share apart.

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
