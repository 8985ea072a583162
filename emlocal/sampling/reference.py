"""The pipeline after EM in its plainest form: full vocabulary, float64, a sort where a sort is meant.

What the sampler's fast path is tested against, and what it falls back to. Ties go to the lower token id.

Penalties on tokens already seen, and logit bias: what happens to the raw logits before EM.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from emlocal.em.entropy import Float64, entropy
from emlocal.errors import UsageError
from emlocal.settings import SamplingParams

COLDEST = 1e-9
"""No temperature but 0 is colder: logits closer than this are ties, and nothing overflows."""


def probabilities(logits: Float64, params: SamplingParams) -> Float64:
    """The distribution that a token is drawn from, [V], given the logits after EM, [V]."""
    p = np.zeros(len(logits))
    temperature = params.temperature_at(float(entropy(logits)), len(logits))
    if temperature == 0:
        p[logits.argmax()] = 1.0
        return p
    weights = np.exp((logits - logits.max()) / max(temperature, COLDEST))
    order = np.argsort(-weights, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    kept = weights[order]
    order = order[: nucleus(kept, float(kept.sum()), params.top_p)]
    order = order[weights[order] >= params.min_p * weights[order[0]]]
    p[order] = weights[order] / weights[order].sum()
    return p


def nucleus(weights: Float64, total: float, top_p: float) -> int:
    """How many of these weights, largest first, it takes to reach the share `top_p` of `total`."""
    if top_p >= 1:
        return len(weights)
    return int(np.searchsorted(np.cumsum(weights), top_p * total, side="left")) + 1


def inverse_cdf(weights: Float64, u: float) -> int:
    """The first index whose cumulative weight exceeds u times the total; u in [0, 1)."""
    cumulative = np.cumsum(weights)
    i = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    if i == len(weights):  # u·total rounded up to the total
        i = int(np.flatnonzero(weights)[-1])
    return i


Float32 = NDArray[np.float32]


def adjust(row: Float32, params: SamplingParams, seen: Sequence[int]) -> Float32:
    """`row` itself where nothing applies, else a copy with penalties, then biases, applied.

    Args:
        row: raw logits, float32 [V].
        seen: prompt and generated token ids, oldest first; the last `repeat_last_n` count.
    """
    counts = counted_tokens(params, seen)
    if not counts and not params.logit_bias:
        return row
    row = row.copy()
    if counts:
        ids = np.fromiter(counts.keys(), dtype=np.intp)
        times = np.fromiter(counts.values(), dtype=np.float32)
        logits = row[ids]
        logits = np.where(logits > 0, logits / params.repeat_penalty, logits * params.repeat_penalty)
        row[ids] = logits - params.presence_penalty - params.frequency_penalty * times
    for token, bias in params.logit_bias:
        if token >= len(row):
            raise UsageError(f"--logit-bias names token {token}; the model's tokens are 0 to {len(row) - 1}")
        row[token] += np.float32(bias)
    return row


def counted_tokens(params: SamplingParams, seen: Sequence[int]) -> Mapping[int, int]:
    """How often each token occurs among those that the penalties look back at; empty where none apply."""
    if not (params.penalizes and seen):
        return {}
    return Counter(seen if params.repeat_last_n < 0 else seen[-params.repeat_last_n :])
