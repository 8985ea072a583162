"""The pipeline after EM in its plainest form: full vocabulary, float64, a sort where a sort is meant.

What the sampler's fast path is tested against, and what it falls back to. Ties go to the lower token id.
"""

import numpy as np

from emlocal.em.entropy import Float64, entropy
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
