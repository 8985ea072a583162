"""EM steps on rows of logits, on their device.

A kernel takes rows float32 [R, V], which it may change, and columns of settings, float64 [R, 1]. −inf marks
masked tokens, which stay masked. A row that takes no step stays the same, bit for bit.

On the CPU a kernel asks which rows need work (`ask`). Elsewhere, to ask would stall the device, so nothing
depends on the rows' values.

EM-INF by gradient descent treats the `HEAD` most probable tokens one by one, in float64, and the others (the
tail) as one, by the first order of their change. With weights w = p·S and exponents s = log w, a tail token
moves by u = w (A s + B), where A and B are sums over the steps. So the sums Σ w² s^k tell how the tail's mass
changes. No tail token has more than 1 / HEAD of the mass; for settings within `REACH` that keeps the total
variation to emlocal's reference below 1e-5. On the CPU a bound on the error is computed, too, and rows beyond
it take a wider head or, last, the long way over all tokens in float64. emlocal/em/fast.py derives the
expansion and the bound.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["none", "sgd", "full", "adam", "adaptive"]
HEAD = 4096
"""Tokens that are treated one by one."""
WIDE = 32768
"""The same for rows that are too open for `HEAD`."""
REACH = 32.0
"""Learning rate times steps, at most, for the quick way."""
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
COLDEST, TOLERANCE = 1e-6, 1e-7
"""Of adaptive temperature: the lowest τ, and the relative tolerance of τ."""
_FLOOR = -1e4
"""A masked token's exponent: its weight is 0, and no product with it is NaN."""
_BLOCK = 32
"""Rows at a time of the ways in float64."""
_AGREED = 9e-6
"""The largest bound on the total variation; the rest of 1e-5 is for rounding to float32."""
_ROUNDING = 3e-7
"""Relative error of float32 sums over the tail."""
_NOTHING = 1e-8
"""Total variation by the tail's own moves that is not worth two passes over it."""
_NEAR = 1e-3
"""Nats; rows whose entropy by float32 is closer to the threshold are looked at in float64."""


class Settings(NamedTuple):
    """Columns of settings, float64 [R, 1]."""

    threshold: Tensor
    steps: Tensor
    learning_rate: Tensor
    kl_weight: Tensor
    ratio: Tensor

    def of(self, rows: Tensor) -> "Settings":
        """Returns the settings of some rows."""
        return Settings(*(column[rows] for column in self))


class Entropies(NamedTuple):
    """What a kernel found, float64 [R, 1]."""

    before: Tensor
    """Nats."""
    after: Tensor
    steps: Tensor
    """EM steps taken."""

    def put(self, rows: Tensor, others: "Entropies") -> None:
        """Replaces those of some rows."""
        for own, other in zip(self, others, strict=True):
            own[rows] = other


class Scratch:
    """Memory that is used again in each step: new pages cost a CPU as much as the arithmetic on them."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def like(self, name: str, z: Tensor) -> Tensor:
        """Returns a tensor of z's shape whose contents are arbitrary, the same memory for each call."""
        held = self._held.get(name)
        if held is None or held.numel() < z.numel() or held.device != z.device:
            held = self._held[name] = torch.empty(z.numel(), dtype=z.dtype, device=z.device)
        return held[: z.numel()].view(z.shape)


def sharpen(
    z: Tensor, settings: Settings, kernel: Kernel, rounds: int, ask: bool, scratch: Scratch | None = None
) -> Entropies:
    """Takes the step of a kernel on rows, in place.

    Args:
        z: float32 [R, V].
        rounds: the most steps of any row.
        ask: whether to look at values on the host.
    """
    scratch = scratch or Scratch()
    if kernel == "none":
        before = _sums(z, scratch).entropy
        return Entropies(before, before, torch.zeros_like(before))
    if kernel == "sgd":
        return descend(z, settings, rounds, ask, scratch)
    if ask:  # rows that are surely left alone need no float64
        before = _sums(z, scratch).entropy
        least = settings.threshold
        if kernel == "adaptive":
            least = torch.maximum(least, settings.ratio * before)
        rows = (before > least - _NEAR)[:, 0].nonzero()[:, 0]
        found = Entropies(before, before.clone(), torch.zeros_like(before))
        if len(rows):
            part = z[rows]
            found.put(rows, _in_blocks(part, settings.of(rows), kernel, rounds, ask))
            z[rows] = part
        return found
    return _in_blocks(z, settings, kernel, rounds, ask)


def _in_blocks(z: Tensor, settings: Settings, kernel: Kernel, rounds: int, ask: bool) -> Entropies:
    """Takes a step in float64, in place, a few rows at a time: it needs several arrays of their size."""
    found = []
    for first in range(0, len(z), _BLOCK):
        block = z[first : first + _BLOCK]
        own = Settings(*(column[first : first + _BLOCK] for column in settings))
        if kernel == "adaptive":
            found.append(cool(block, own, ask))
        else:
            found.append(descend_fully(block, own, rounds, ask, adam=kernel == "adam"))
    return Entropies(*(torch.cat(columns) for columns in zip(*found, strict=True)))


class _Sums(NamedTuple):
    top: Tensor
    s: Tensor
    """Exponents, float32 [R, V]."""
    w: Tensor
    """Weights e^s."""
    ws: Tensor
    entropy: Tensor
    """By float32, float64 [R, 1]."""


def _sums(z: Tensor, scratch: Scratch) -> _Sums:
    top = z.amax(-1, keepdim=True)
    s, w, ws = (scratch.like(name, z) for name in ("s", "w", "ws"))
    torch.sub(z, top, out=s).clamp_(min=_FLOOR)
    torch.exp(s, out=w)
    torch.mul(w, s, out=ws)
    total = w.sum(-1, keepdim=True).double()
    entropy = (total.log() - ws.sum(-1, keepdim=True).double() / total).clamp_min(0.0)
    return _Sums(top, s, w, ws, entropy)


def descend(z: Tensor, settings: Settings, rounds: int, ask: bool, scratch: Scratch) -> Entropies:
    """Takes EM-INF's steps of gradient descent, in place: head by head, the tail as one."""
    sums = _sums(z, scratch)
    none = torch.zeros_like(sums.entropy)
    found = Entropies(sums.entropy, sums.entropy.clone(), none)
    if not rounds:
        return found
    if not ask:
        new, own, _ = _expand(z, sums, settings, rounds, ask)
        z.copy_(torch.where(own.steps > 0, new, z))
        return own
    near = (settings.steps > 0) & (settings.threshold < sums.entropy + _NEAR)
    rows = near[:, 0].nonzero()[:, 0]
    if not len(rows):
        return found
    if len(rows) == len(z):
        raw, part, own_settings = z, sums, settings
    else:
        raw, own_settings = z[rows], settings.of(rows)
        wide = [
            torch.index_select(each, 0, rows, out=scratch.like(name, raw))
            for name, each in (("part s", sums.s), ("part w", sums.w), ("part ws", sums.ws))
        ]
        part = _Sums(sums.top[rows], *wide, sums.entropy[rows])
    new, own, error = _expand(raw, part, own_settings, rounds, ask)
    far = (~(error <= _AGREED))[:, 0].nonzero()[:, 0]
    if len(far):
        again, own_far = raw[far], own_settings.of(far)
        wider, found_far, error = _expand(again, _sums(again, Scratch()), own_far, rounds, ask, WIDE)
        left = (~(error <= _AGREED))[:, 0].nonzero()[:, 0]
        if len(left):
            last = again[left]
            found_far.put(left, descend_fully(last, own_far.of(left), rounds, ask, adam=False))
            wider[left] = last
        own.put(far, found_far)
        new[far] = wider
    moved = own.steps[:, 0] > 0
    z[rows[moved]] = new[moved]
    found.put(rows, own)
    return found


def _expand(
    raw: Tensor, sums: _Sums, settings: Settings, rounds: int, ask: bool, head: int = HEAD
) -> tuple[Tensor, Entropies, Tensor]:
    """Returns rows after the steps, what was found, and a bound on the total variation, [R, 1].

    It uses up the memory of `sums`.
    """
    head_raw, at = raw.topk(min(head, raw.shape[-1]), sorted=False)
    masked = head_raw == -math.inf
    h = (head_raw.double() - sums.top.double()).clamp_min(_FLOOR)
    w, ws = sums.w.scatter_(-1, at, 0.0), sums.ws.scatter_(-1, at, 0.0)
    mass, moment = (each.sum(-1, keepdim=True).double() for each in (w, ws))
    Q0, Q1, Q2 = (
        torch.mul(a, b, out=sums.s).sum(-1, keepdim=True).double() for a, b in ((w, w), (w, ws), (ws, ws))
    )
    log_c = h.amin(-1, keepdim=True)
    A, B, taken = (torch.zeros_like(mass) for _ in range(3))
    amplified = torch.zeros_like(mass)
    nearest, least = torch.full_like(mass, math.inf), torch.full_like(mass, math.inf)
    before: Tensor | None = None
    t0, t1 = mass, moment
    for step in range(rounds + 1):
        weights = h.exp()
        S = weights.sum(-1, keepdim=True) + t0
        log_S = S.log()
        H = (log_S - ((weights * h).sum(-1, keepdim=True) + t1) / S).clamp_min(0.0)
        before = H if before is None else before
        active = (settings.steps > step) & (settings.threshold < H)
        nearest = torch.where(settings.steps > step, (H - settings.threshold).abs().minimum(nearest), nearest)
        least = least.minimum(S)
        if step == rounds or (ask and not bool(active.any())):
            break
        rate = torch.where(active, settings.learning_rate, 0.0)
        p, a = weights / S, h + (H - log_S)
        if ask:
            amplified = torch.where(active, amplified * (1 + rate * _curvature(p, a, H)) + 1, amplified)
        h = h + rate * p * a
        A, B = A + rate / S, B + rate / S * (H - log_S)
        t0 = mass + A * Q1 + B * Q0
        t1 = moment + A * (Q2 + Q1) + B * (Q1 + Q0)
        taken += active
    assert before is not None
    b0, b1 = (A * Q1 + B * Q0).abs(), (A * Q2 + B * Q1).abs()
    c = log_c.exp()
    U = (c * (A * log_c + B)).abs()
    q = (A * A * Q2 + 2 * A * B * Q1 + B * B * Q0).clamp_min(0.0)
    spread = U.clamp_max(50.0).exp()
    nu = spread * (c * q / 2 + 2 * U * b0) / least + _ROUNDING * mass / least
    nu_moment = spread * (c * (1 - log_c) * q + 2 * U * (b0 + b1)) / least
    nu_moment = nu_moment + _ROUNDING * moment.abs() / least
    log_V = math.log(raw.shape[-1])
    off_H = nu_moment + nu * (1 + 2 * log_V)
    error = amplified * settings.learning_rate * (nu + off_H)
    undecided = (settings.threshold > 0) & (nearest <= off_H + error * (1 + log_V) + 1e-12)
    error = torch.where(undecided, math.inf, error / 2 + 2 * b0 * U / least)
    new = torch.sub(raw, sums.top, out=sums.s)
    moves = 2 * b0 / least > _NOTHING
    if not ask or bool(moves.any()):
        new.addcmul_(ws, torch.where(moves, A, 0.0).float()).addcmul_(w, torch.where(moves, B, 0.0).float())
    new.scatter_(-1, at, torch.where(masked, -math.inf, h).float())
    return new, Entropies(before, torch.where(taken > 0, H, before), taken), error


def _curvature(p: Tensor, a: Tensor, H: Tensor) -> Tensor:
    """Returns a bound on the factor, less 1 and over η, by which a step makes errors of the head grow.

    It is the λ of emlocal/em/fast.py: the top token's row of the Jacobian apart from the others.
    """
    pp, pa = p.square(), p * a
    yy, yg, gg = (each.sum(-1, keepdim=True) for each in (pp, pp * a, pa.square()))
    p1 = p.amax(-1, keepdim=True)
    log_p1 = p1.log()
    d1, x1 = p1 * (log_p1 + H + 1), p1 * (log_p1 + H + 0.5)
    p2 = torch.minimum(p1, 1 - p1).clamp_min(1e-300)
    d2 = (p2 * (p2.log() + H + 1)).clamp_min(0.0)
    xy, norms = yg + yy / 2, ((gg + yg + yy / 4).clamp_min(0.0) * yy).sqrt()
    alpha = (yy / norms.clamp_min(1e-300)).sqrt()
    u1 = alpha * x1 + p1 / alpha.clamp_min(1e-300)
    rest = (2 * (norms + xy) - u1 * u1).clamp_min(0.0).sqrt()
    top, coupling = d1 - u1 * u1 / 2, u1 * rest
    high = (top + d2 + torch.hypot(top - d2, coupling)) / 2
    return high.clamp_min(0.0) + norms - xy


def distribution(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns p and log p, [R, V], and the entropy in nats, [R, 1]."""
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    return p, log_p, (-(p * log_p).sum(-1, keepdim=True)).clamp_min(0.0)


def descend_fully(raw: Tensor, settings: Settings, rounds: int, ask: bool, *, adam: bool) -> Entropies:
    """Takes EM-INF's steps over all tokens in float64, in place, by gradient descent or Adam.

    Source of Adam: Kingma & Ba 2015, algorithm 1, from a new state for each row.
    """
    z = (raw.double() - raw.amax(-1, keepdim=True).double()).clamp_min(_FLOOR)
    taken = torch.zeros_like(settings.steps)
    mean, square = (torch.zeros_like(z), torch.zeros_like(z)) if adam else (z, z)
    p0 = before = after = None
    for step in range(rounds + 1):
        p, log_p, H = distribution(z)
        p0, before = (p, H) if p0 is None or before is None else (p0, before)
        after = H
        active = (settings.steps > step) & (settings.threshold < H)
        if step == rounds or (ask and not bool(active.any())):
            break
        gradient = settings.kl_weight * (p - p0) - p * (log_p + H)
        if adam:
            mean += (1 - BETA1) * (gradient - mean)
            square += (1 - BETA2) * (gradient * gradient - square)
            root = square.sqrt() / math.sqrt(1 - BETA2 ** (step + 1))
            gradient = mean / (1 - BETA1 ** (step + 1)) / (root + EPSILON)
        z = torch.where(active, z - settings.learning_rate * gradient, z)
        taken += active
    assert before is not None
    assert after is not None
    _replace(raw, z, taken > 0)
    return Entropies(before, torch.where(taken > 0, after, before), taken)


def cool(raw: Tensor, settings: Settings, ask: bool) -> Entropies:
    """Takes the step of adaptive temperature, in place.

    It finds the largest τ with H(softmax(z/τ)) ≤ max(ratio · H₀, threshold): by bisection on the head, with a
    guess for the tail, and then by Newton's method over all tokens, kept in a bracket.
    """
    z = (raw.double() - raw.amax(-1, keepdim=True).double()).clamp_min(_FLOOR)
    before = distribution(z)[2]
    target = torch.maximum(settings.ratio * before, settings.threshold)
    cooled = before > target
    low, high = torch.full_like(before, math.log(COLDEST)), torch.zeros_like(before)
    x = _guess(z, target)
    rounds = 60 if ask else 12
    for _ in range(rounds):
        H, slope = _entropy_at(z, x)
        fits = target >= H
        low, high = torch.where(fits, x, low), torch.where(fits, high, x)
        following = x + (target - H) / slope.clamp_min(1e-30)
        # just below the root: the bracket then closes from both sides
        following = following - 0.4 * TOLERANCE
        inside = (following > low) & (following < high)
        x = torch.where(inside, following, (low + high) / 2)
        if ask and bool((((high - low) <= TOLERANCE) | ~cooled).all()):
            break
    none_fits = _entropy_at(z, torch.full_like(before, math.log(COLDEST)))[0] > target
    tau = torch.where(none_fits, COLDEST, low.exp())
    z = torch.where(cooled, z / tau, z)
    _replace(raw, z, cooled)
    return Entropies(before, torch.where(cooled, distribution(z)[2], before), cooled.to(before.dtype))


def _entropy_at(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the entropy at log τ = x, and its slope dH/dx = Var(z/τ), [R, 1]."""
    y = z / x.exp()
    p, log_p, H = distribution(y)
    return H, (p * (log_p + H).square()).sum(-1, keepdim=True)


def _guess(z: Tensor, target: Tensor) -> Tensor:
    """Returns log τ by bisection on the head; the tail counts by its mean exponent and its variance."""
    head, at = z.topk(min(HEAD, z.shape[-1]), sorted=False)
    w = z.exp().scatter(-1, at, 0.0)
    mass = w.sum(-1, keepdim=True)
    mean = (w * z).sum(-1, keepdim=True) / mass.clamp_min(1e-300)
    variance = (w * (z - mean).square()).sum(-1, keepdim=True) / mass.clamp_min(1e-300)
    low, high = torch.full_like(target, math.log(COLDEST)), torch.zeros_like(target)
    for _ in range(30):
        x = (low + high) / 2
        beta = (-x).exp()
        rise = (beta - 1).clamp_max(1 / variance.clamp_min(1e-9))  # the cumulants are good for small ones
        shift = mean + rise * variance
        tail = mass * (rise * mean + rise * rise * variance / 2).clamp_max(0.0).exp()
        y = beta * head
        weights = y.exp()
        S = weights.sum(-1, keepdim=True) + tail
        H = S.log() - ((weights * y).sum(-1, keepdim=True) + tail * beta * shift) / S
        fits = target >= H
        low, high = torch.where(fits, x, low), torch.where(fits, high, x)
    return low


def _replace(raw: Tensor, z: Tensor, moved: Tensor) -> None:
    """Writes the rows that moved into `raw`; masked tokens stay masked."""
    raw.copy_(torch.where(moved & (raw > -math.inf), z.float(), raw))
