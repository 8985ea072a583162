"""Penalties on tokens already seen, and logit bias: what happens to the raw logits before EM."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from emlocal.errors import UsageError
from emlocal.settings import SamplingParams

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
