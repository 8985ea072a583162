"""Temperature, top-k, top-p, min-p and the inverse-CDF draw on blocks of rows, without float64.

The same as emlocal.sampling.reference; settings are columns, [R, 1]. Weights are float32, at most 1; their
sums are of integers, in units of 2⁻⁴⁴, and so exact in any order: the draw adds no error of its own to that
of the weights, the last token with any weight is never passed, and it cannot matter how a device shares a
sum out among its threads. With 262,144 tokens what is cut off comes to less than 2⁻²⁶ of the total.
Prefix sums are made of shifted additions, since MLX has no scans of 64-bit integers for Metal.
"""

import math
from typing import NamedTuple

import mlx.core as mx

from emlocal.backends.mlx.em import GROUP
from emlocal.sampling.reference import COLDEST

_UNIT = 2.0**44
MOST_TOKENS = 1 << 19
"""A sum of more of them could overflow."""
_LOW = 0xFFFFFFFF


class Truncation(NamedTuple):
    """What follows the EM step, [R, 1] each."""

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
    """The tokens that `fractions.u` draws, int32 [R, 1].

    Args:
        z: logits after the EM step, float32 [R, V].
        entropy: theirs, nats [R, 1].
        vocabulary: tokens that are not padding.
        ordered: whether any row has top-k or top-p, which need a sort.
    """
    temperature = temperature_at(entropy, settings, vocabulary)
    shifted = z - z.max(axis=-1, keepdims=True)
    greedy = temperature == 0
    weights = mx.exp(shifted / mx.maximum(temperature, COLDEST))
    # greedy: the tokens at the top share everything, and u = 0 takes the first
    weights = mx.where(greedy, (shifted == 0).astype(mx.float32), weights)
    if ordered:
        weights = _keep_largest(weights, settings, fractions)
    weights = mx.where(weights >= settings.min_p, weights, 0.0)  # the largest weighs 1
    return inverse_cdf(weights, mx.where(greedy, mx.array(0, mx.uint64), fractions.u))


def temperature_at(entropy: mx.array, settings: Truncation, vocabulary: int) -> mx.array:
    """SamplingParams.temperature_at."""
    if vocabulary == 1:
        return settings.temperature
    low = mx.maximum(settings.temperature - settings.dynatemp_range, 0.0)
    share = mx.minimum(entropy / math.log(vocabulary), 1.0) ** settings.dynatemp_exponent
    ranged = low + (settings.temperature + settings.dynatemp_range - low) * share
    return mx.where(settings.dynatemp_range == 0, settings.temperature, ranged)


def _keep_largest(weights: mx.array, settings: Truncation, fractions: Fractions) -> mx.array:
    """Top-k, then top-p; 0 for what they drop. Among equal weights the lower ids stay."""
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
    """The first index whose cumulative weight exceeds u · total, int32 [R, 1]."""
    whole = fixed(weights)
    return first_above(whole, part(whole.sum(axis=-1, keepdims=True), u))


def fixed(weights: mx.array) -> mx.array:
    """Weights of at most 1 as uint64, in units of 2⁻⁴⁴; what is below one unit is cut off."""
    return (weights * _UNIT).astype(mx.uint64)


def part(total: mx.array, fraction: mx.array) -> mx.array:
    """fraction · total, rounded down, for a fraction in units of 2⁻⁶⁴; always below the total.

    It may be 2 units low: the carry of the lowest products is left out.
    """
    high, low = total >> 32, total & _LOW
    upper, lower = fraction >> 32, fraction & _LOW
    return high * upper + ((high * lower) >> 32) + ((low * upper) >> 32)


def first_above(whole: mx.array, target: mx.array) -> mx.array:
    """The first index whose cumulative sum is above `target`, which the total is; by groups, then within one.

    uint64 [R, n · GROUP] and [R, 1] → int32 [R, 1].
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
    """Inclusive, along the last axis of [R, n], in log₂ n additions of the array shifted by 1, 2, 4, …"""
    shift = 1
    while shift < values.shape[1]:
        values = values + mx.pad(values[:, :-shift], [(0, 0), (shift, 0)])
        shift *= 2
    return values
