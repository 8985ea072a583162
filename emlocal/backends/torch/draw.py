"""Temperature, top-k, top-p, min-p and the inverse-CDF draw on blocks of rows, float64 [R, V].

The same as emlocal.sampling.reference; settings are columns, [R, 1]. No host is asked.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from emlocal.sampling.reference import COLDEST

GROUP = 512
"""Tokens that the draw sums up first; V is a multiple of it here."""
TOP = 1024
"""Rows that keep no more tokens than this need no sort of the vocabulary."""


class Truncation(NamedTuple):
    """What follows the EM step, [R, 1] each."""

    u: Tensor
    temperature: Tensor
    dynatemp_range: Tensor
    dynatemp_exponent: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def choose(z: Tensor, entropy: Tensor, settings: Truncation, vocabulary: int, largest: int) -> Tensor:
    """The tokens that `settings.u` draws, int64 [R, 1].

    Args:
        z: logits after the EM step.
        entropy: theirs, nats [R, 1].
        vocabulary: tokens that are not padding.
        largest: of how many tokens the order is needed: 0 where no row has top-k or top-p, TOP where each
            row has a top-k up to that, else V.
    """
    temperature = temperature_at(entropy, settings, vocabulary)
    shifted = z - z.amax(-1, keepdim=True)
    greedy = temperature == 0
    weights = (shifted / temperature.clamp_min(COLDEST)).exp()
    # greedy: the tokens at the top share everything, and u = 0 takes the first
    weights = torch.where(greedy, (shifted == 0).to(z.dtype), weights)
    if largest:
        weights = _keep_largest(weights, settings, min(largest, weights.shape[1]))
    weights = torch.where(weights >= settings.min_p, weights, 0.0)  # the largest weighs 1
    return inverse_cdf(weights, torch.where(greedy, 0.0, settings.u))


def temperature_at(entropy: Tensor, settings: Truncation, vocabulary: int) -> Tensor:
    """SamplingParams.temperature_at."""
    if vocabulary == 1:
        return settings.temperature
    low = (settings.temperature - settings.dynatemp_range).clamp_min(0.0)
    share = (entropy / math.log(vocabulary)).clamp_max(1.0) ** settings.dynatemp_exponent
    ranged = low + (settings.temperature + settings.dynatemp_range - low) * share
    return torch.where(settings.dynatemp_range == 0, settings.temperature, ranged)


def _keep_largest(weights: Tensor, settings: Truncation, m: int) -> Tensor:
    """Top-k, then top-p; 0 for what they drop. Among equal weights the lower ids stay."""
    if m < weights.shape[1]:
        ordered = weights.topk(m, dim=-1).values
    else:
        ordered = weights.sort(dim=-1, descending=True).values
    k = torch.where(settings.top_k > 0, settings.top_k, m).clamp_max(m)
    ranks = torch.arange(m, device=weights.device)
    sums = torch.where(ranks < k, ordered, 0.0).cumsum(-1)
    nucleus = (sums < settings.top_p * sums[:, -1:]).sum(-1, keepdim=True) + 1
    n = torch.where(settings.top_p < 1, torch.minimum(nucleus, k), k).long()
    least = ordered.gather(-1, n - 1)
    above, equal = weights > least, weights == least
    room = n - above.sum(-1, keepdim=True)
    return torch.where(above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room)), weights, 0.0)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds u · total, int64 [R, 1]: by groups, then within one."""
    grouped = weights.view(len(weights), -1, GROUP)
    sums = grouped.sum(-1)
    cumulative = sums.cumsum(-1)
    target = u * cumulative[:, -1:]
    group = _first_above(cumulative, sums, target)
    before = torch.where(group > 0, cumulative.gather(-1, (group - 1).clamp_min(0)), 0.0)
    inside = grouped.gather(1, group[..., None].expand(-1, 1, GROUP))[:, 0]
    return group * GROUP + _first_above(inside.cumsum(-1), inside, target - before)


def _first_above(cumulative: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """The first index where `cumulative` > target; the last with any weight where rounding leaves none."""
    last = torch.where(weights > 0, torch.arange(weights.shape[-1], device=weights.device), 0)
    return torch.minimum((cumulative <= target).sum(-1, keepdim=True), last.amax(-1, keepdim=True))
