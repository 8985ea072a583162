"""From rows of logits on a device to tokens: one compiled function, and one small transfer to the host.

It does the work of emlocal.sampling.draw on blocks of rows instead of single rows, in float32 and 64-bit
integers, since Apple's GPUs have no float64. Tokens are the reference's unless u is within EDGE of a border
of its CDF. The host's half is emlocal.backends.device_sampler.

Rows are float32 [R, V], with FLOOR for masked tokens; settings are columns, [R, 1]. First comes the EM step,
as in emlocal.em's references. The number of rounds is fixed before they begin; a row that is done stays the
same, bit for bit, while others continue. All are functions of arrays alone, for mx.compile.

Then come temperature, top-k, top-p, min-p and the inverse-CDF draw. Weights are float32, at most 1. Their
sums are sums of integers, in units of 2⁻⁴⁴, and so exact in any order. The draw therefore adds no error of
its own to that of the weights, and never passes the last token with any weight. The way a device splits a sum
among its threads does not matter. With 262,144 tokens, the cut-off parts are less than 2⁻²⁶ of the total.
Prefix sums are made of shifted additions, since MLX has no scans of 64-bit integers for Metal.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from emlocal.backends import device_sampler
from emlocal.backends.base import Row
from emlocal.backends.device_sampler import INFINITE, MASKED, NAN, DeviceSampler, Run, kernel_of, most_steps
from emlocal.em.steps.adaptive_temperature import COLDEST
from emlocal.em.steps.em_inf import BETA1, BETA2, EPSILON
from emlocal.errors import ModelError
from emlocal.sampling import SamplingParams
from emlocal.sampling.draw import COLDEST as COLDEST_DRAW

GROUP = 512
"""V is a multiple of it; groups of this many numbers are summed up first."""
FLOOR = -1e20
"""A masked token's logit: its probability is 0, and no product with it is NaN, as with -inf."""
HALVINGS = 28
"""Halvings of the bisection's interval, which is 14 wide: finer than float32 tells temperatures apart."""


class Sharpened(NamedTuple):
    """Rows after an EM step."""

    z: mx.array
    """[R, V]."""
    entropy_before: mx.array
    """Nats, [R, 1]; the next fields, too."""
    entropy_after: mx.array
    steps: mx.array


class Descent(NamedTuple):
    """EM-INF's settings, [R, 1] each."""

    threshold: mx.array
    steps: mx.array
    learning_rate: mx.array
    kl_weight: mx.array


def total(values: mx.array) -> mx.array:
    """Returns the sums of rows, [R, V] → [R, 1], by groups of groups.

    MLX's CPU adds one after another, which over 49,152 numbers costs 1e-4 of the sum.
    """
    grouped = values.reshape(len(values), -1, GROUP // 32, 32)
    return grouped.sum(axis=-1).sum(axis=-1).sum(axis=-1, keepdims=True)


def distribution(z: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Returns p and log p, [R, V], and the entropy in nats, [R, 1]."""
    shifted = z - z.max(axis=-1, keepdims=True)
    weights = mx.exp(shifted)
    mass = total(weights)
    p, log_p = weights / mass, shifted - mx.log(mass)
    return p, log_p, mx.maximum(-total(p * log_p), 0.0)


def entropy(z: mx.array) -> mx.array:
    """Returns the entropy in nats, [R, 1]."""
    return distribution(z)[2]


def gradient_descent(z: mx.array, settings: Descent, rounds: int, *, with_kl: bool) -> Sharpened:
    """Takes EM-INF's steps by gradient descent: ∂H/∂z = −p (log p + H), and with KL also κ (p − p⁰).

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
    """Takes EM-INF's steps with Adam from a new state. Source: Kingma & Ba 2015, algorithm 1."""
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
    """Cools rows to the entropy max(ratio · H₀, threshold), by bisection of log τ."""
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


_UNIT = 2.0**44
MOST_TOKENS = 1 << 19
"""The most tokens; a sum over more could overflow."""
_LOW = 0xFFFFFFFF


class Truncation(NamedTuple):
    """The settings of the steps after the EM step, [R, 1] each."""

    temperature: mx.array
    dynatemp_range: mx.array
    dynatemp_exponent: mx.array
    top_k: mx.array
    top_p: mx.array
    min_p: mx.array


class Fractions(NamedTuple):
    """Numbers below 1 to their last bit, uint64 [R, 1], in units of 2⁻⁶⁴."""

    u: mx.array
    top_p: mx.array


def choose(
    z: mx.array, entropy: mx.array, settings: Truncation, fractions: Fractions, vocabulary: int, ordered: bool
) -> mx.array:
    """Returns the tokens that `fractions.u` draws, int32 [R, 1].

    Args:
        z: logits after the EM step, float32 [R, V].
        entropy: theirs, nats [R, 1].
        vocabulary: tokens that are not padding.
        ordered: whether any row has top-k or top-p, which need a sort.
    """
    temperature = temperature_at(entropy, settings, vocabulary)
    shifted = z - z.max(axis=-1, keepdims=True)
    greedy = temperature == 0
    weights = mx.exp(shifted / mx.maximum(temperature, COLDEST_DRAW))
    # greedy: the tokens at the top share all the weight, and u = 0 takes the first
    weights = mx.where(greedy, (shifted == 0).astype(mx.float32), weights)
    if ordered:
        weights = _keep_largest(weights, settings, fractions)
    weights = mx.where(weights >= settings.min_p, weights, 0.0)  # the largest weight is 1
    return inverse_cdf(weights, mx.where(greedy, mx.array(0, mx.uint64), fractions.u))


def temperature_at(entropy: mx.array, settings: Truncation, vocabulary: int) -> mx.array:
    """Returns SamplingParams.temperature_at for each row."""
    if vocabulary == 1:
        return settings.temperature
    low = mx.maximum(settings.temperature - settings.dynatemp_range, 0.0)
    share = mx.minimum(entropy / math.log(vocabulary), 1.0) ** settings.dynatemp_exponent
    ranged = low + (settings.temperature + settings.dynatemp_range - low) * share
    return mx.where(settings.dynatemp_range == 0, settings.temperature, ranged)


def _keep_largest(weights: mx.array, settings: Truncation, fractions: Fractions) -> mx.array:
    """Applies top-k, then top-p: dropped tokens get weight 0. Among equal weights the lower ids stay."""
    size = weights.shape[1]
    descending = -mx.sort(-weights, axis=-1)
    k = mx.minimum(mx.where(settings.top_k > 0, settings.top_k, float(size)), float(size))
    kept = fixed(mx.where(mx.arange(size) < k, descending, 0.0))
    target = part(kept.sum(axis=-1, keepdims=True), fractions.top_p)
    nucleus = first_above(kept, mx.maximum(target, mx.array(1, mx.uint64)) - 1) + 1  # sums reach the target
    n = mx.where(settings.top_p < 1, mx.minimum(nucleus, k), k).astype(mx.int32)
    least = mx.take_along_axis(descending, n - 1, axis=-1)
    above, equal = weights > least, weights == least
    room = n - above.sum(axis=-1, keepdims=True)
    among_equals = mx.cumsum(equal.astype(mx.int32), axis=-1)
    return mx.where(above | (equal & (among_equals <= room)), weights, 0.0)


def inverse_cdf(weights: mx.array, u: mx.array) -> mx.array:
    """Returns the first index whose cumulative weight exceeds u · total, int32 [R, 1]."""
    whole = fixed(weights)
    return first_above(whole, part(whole.sum(axis=-1, keepdims=True), u))


def fixed(weights: mx.array) -> mx.array:
    """Returns weights of at most 1 as uint64, in units of 2⁻⁴⁴; smaller parts are cut off."""
    return (weights * _UNIT).astype(mx.uint64)


def part(total: mx.array, fraction: mx.array) -> mx.array:
    """Returns fraction · total, rounded down, for a fraction in units of 2⁻⁶⁴; always below the total.

    It may be 2 units low, because the carry of the lowest products is left out.
    """
    high, low = total >> 32, total & _LOW
    upper, lower = fraction >> 32, fraction & _LOW
    return high * upper + ((high * lower) >> 32) + ((low * upper) >> 32)


def first_above(whole: mx.array, target: mx.array) -> mx.array:
    """Returns the first index whose cumulative sum is above `target`: uint64 [R, n · GROUP] → int32 [R, 1].

    `target` is uint64 [R, 1], and the total is above it. The search goes by groups, then within one.
    """
    grouped = whole.reshape(whole.shape[0], -1, GROUP)
    sums = prefix_sums(grouped.sum(axis=-1))
    group = (sums <= target).sum(axis=-1, keepdims=True).astype(mx.int32)
    before = mx.take_along_axis(sums, mx.maximum(group - 1, 0), axis=-1)
    before = mx.where(group > 0, before, mx.array(0, mx.uint64))
    inside = mx.take_along_axis(grouped, mx.broadcast_to(group[..., None], (len(group), 1, GROUP)), axis=1)
    within = prefix_sums(inside[:, 0]) + before
    return group * GROUP + (within <= target).sum(axis=-1, keepdims=True).astype(mx.int32)


def prefix_sums(values: mx.array) -> mx.array:
    """Returns inclusive prefix sums along the last axis of [R, n].

    It takes log₂ n additions of the array shifted by 1, 2, 4, …
    """
    shift = 1
    while shift < values.shape[1]:
        values = values + mx.pad(values[:, :-shift], [(0, 0), (shift, 0)])
        shift *= 2
    return values


EDGE = 2e-6
"""The tested distance of u from a border of the exact CDF within which another token may be drawn."""
CPU_ROWS, GPU_ROWS = 2, 4
"""Rows of a block."""
Block = Callable[[mx.array, mx.array, mx.array], mx.array]


class MLXSampler(DeviceSampler):
    """The sampler of the mlx engine; see DeviceSampler."""

    def __init__(self, vocabulary: int, *, on_gpu: bool) -> None:
        """Raises ModelError for more than 524,288 tokens, whose sums would not fit 64 bits."""
        if vocabulary > MOST_TOKENS:
            raise ModelError(
                f"the model has {vocabulary:,} tokens; on GPUs the mlx engine samples from"
                f" {MOST_TOKENS:,} at most"
            )
        self.vocabulary = vocabulary
        self.block = GPU_ROWS if on_gpu else CPU_ROWS
        self._compiled: dict[Hashable, Block] = {}

    def _structure(self, params: SamplingParams) -> Hashable:
        """Returns the key of a compiled function: EM step's kernel, whether rows need a sort, rounds."""
        ordered = params.top_p < 1 or 0 < params.top_k < self.vocabulary
        return kernel_of(params.em), ordered, most_steps(params.em)

    def _begin(self, logits: mx.array, at: Sequence[int], rows: Sequence[Row]) -> Run:
        settings, fractions = device_sampler.columns(rows).astype(np.float32), _fractions(rows)

        def run(structure: tuple[str, bool, int], block: Sequence[int], full: Sequence[int]) -> mx.array:
            raw = adjusted(logits[mx.array([at[i] for i in full])], [rows[i] for i in block])
            columns = mx.array(settings[:, full, None]), mx.array(fractions[:, full, None])
            return self._function(structure)(raw, *columns)

        return run

    def _fetch(self, outcomes: Sequence[Any]) -> NDArray[np.float32]:
        return np.array(mx.concatenate(list(outcomes)))

    def _function(self, structure: tuple[str, bool, int]) -> Block:
        """Returns `sample_block` for rows whose settings have this structure, compiled on its first use."""
        if structure not in self._compiled:
            kind, ordered, rounds = structure
            self._compiled[structure] = mx.compile(
                partial(sample_block, kind=kind, ordered=ordered, rounds=rounds, vocabulary=self.vocabulary)
            )
        return self._compiled[structure]


def sample_block(
    raw: mx.array,
    columns: mx.array,
    fractions: mx.array,
    kind: str,
    ordered: bool,
    rounds: int,
    vocabulary: int,
) -> mx.array:
    """Returns the fields of Draw, or a fault in place of the token: float32 [R, V] → float32 [R, 7].

    `columns` are the settings, float32 [11, R, 1]; `fractions` uint64 [2, R, 1].
    """
    top = raw.max(axis=-1, keepdims=True)
    fault = mx.where(top == -mx.inf, MASKED, mx.where(top == mx.inf, INFINITE, 0))
    fault = mx.where(mx.isnan(raw).any(axis=-1, keepdims=True), NAN, fault)
    z0 = mx.where(fault < 0, 0.0, raw)
    z0 = mx.maximum(z0 - z0.max(axis=-1, keepdims=True), FLOOR)
    z0 = mx.pad(z0, [(0, 0), (0, -vocabulary % GROUP)], constant_values=FLOOR)
    truncation, descent, ratio = Truncation(*columns[:6]), Descent(*columns[6:10]), columns[10]
    exact = Fractions(*fractions)
    sharpened = _sharpen(z0, kind, descent, ratio, rounds)
    token = choose(sharpened.z, sharpened.entropy_after, truncation, exact, vocabulary, ordered)
    without, p_before = token, _probability(z0, token)
    p_after = p_before
    if kind != "none":
        moved = sharpened.steps > 0
        plain = choose(z0, sharpened.entropy_before, truncation, exact, vocabulary, ordered)
        without = mx.where(moved, plain, token)
        p_after = mx.where(moved, _probability(sharpened.z, token), p_before)
    fields = (
        mx.where(fault < 0, fault, token),
        *(sharpened.entropy_before, sharpened.entropy_after, sharpened.steps),
        *(p_before, p_after, without),
    )
    return mx.concatenate([field.astype(mx.float32) for field in fields], axis=-1)


def _sharpen(z: mx.array, kind: str, descent: Descent, ratio: mx.array, rounds: int) -> Sharpened:
    if kind in ("sgd", "sgd+kl"):
        return gradient_descent(z, descent, rounds, with_kl=kind == "sgd+kl")
    if kind == "adam":
        return adam(z, descent, rounds)
    if kind == "adaptive":
        return adaptive_temperature(z, ratio, descent.threshold)
    H = entropy(z)
    return Sharpened(z, H, H, mx.zeros_like(H))


def _fractions(rows: Sequence[Row]) -> NDArray[np.uint64]:
    """Returns u and top-p, in units of 2⁻⁶⁴, exactly: uint64 [2, B]."""
    wanted = [
        [int(row.u * 2**64) for row in rows],
        [int(min(row.params.top_p, 1 - 2**-53) * 2**64) for row in rows],
    ]
    return np.array(wanted, dtype=np.uint64)


def adjusted(block: mx.array, rows: Sequence[Row]) -> mx.array:
    """Applies penalties, then biases, then masks, to the first rows of a block, float32 [R, V], in place."""
    entries = device_sampler.penalized(rows)
    if entries:
        at, tokens = mx.array([i for i, *_ in entries]), mx.array([token for _, token, *_ in entries])
        times = mx.array([n for *_, n, _ in entries])
        repeat = mx.array([p.repeat_penalty for *_, p in entries])
        minus = mx.array([p.presence_penalty for *_, p in entries])
        frequency = mx.array([p.frequency_penalty for *_, p in entries])
        old = block[at, tokens]
        block[at, tokens] = mx.where(old > 0, old / repeat, old * repeat) - minus - frequency * times
    biases = device_sampler.biased(rows, block.shape[1])
    if biases:
        at, tokens = mx.array([i for i, *_ in biases]), mx.array([token for _, token, _ in biases])
        block[at, tokens] = block[at, tokens] + mx.array([bias for *_, bias in biases])
    packed = device_sampler.legal_bits(rows, block.shape[1])
    if packed is not None:
        legal = (mx.array(packed)[..., None] >> mx.arange(8, dtype=mx.uint8)) & 1
        legal = legal.reshape(len(rows), -1)[:, : block.shape[1]]
        block[: len(rows)] = mx.where(legal == 0, -mx.inf, block[: len(rows)])
    return block


def _probability(z: mx.array, token: mx.array) -> mx.array:
    """Returns softmax(z) at the token, [R, 1]."""
    shifted = z - z.max(axis=-1, keepdims=True)
    return mx.exp(mx.take_along_axis(shifted, token, axis=-1)) / total(mx.exp(shifted))
