"""A draw: its random number, its result, and the reference of the steps around the EM step.

Each token has one uniform. Its address is what it is for, not when it is asked for: u = Philox4x64-10 with
key (seed, request key) and counter (token index, sample index). A draw therefore does not depend on the
batch, the engine, or earlier draws. A resumed run repeats itself, and two samplers run on the same request
share their draws. Source: Salmon et al. 2011; numpy.random.Philox, whose raw stream NumPy keeps stable.

The reference is the pipeline in its plainest form: before EM, penalties on tokens already seen and logit
bias; after EM, temperature, truncation and the draw. It works on the full vocabulary, in float64, and sorts
where the definition sorts. The samplers' fast paths are tested against it, and fall back to it. Ties go to
the lower token id.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

from emlocal.em.entropy import Float64, entropy
from emlocal.errors import UsageError
from emlocal.settings import SamplingParams

_AHEAD = 64  # tokens per refill; each counter value gives four


def request_key(name: str) -> int:
    """Returns the 64-bit key for a request's name (its `custom_id`, say)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class Uniforms:
    """The uniforms of one sample of one request. `self[t]` is token t's, a float in [0, 1)."""

    def __init__(self, seed: int, key: int = 0, sample: int = 0, start: int = 0) -> None:
        """Sets seed, request key and sample.

        `start`: the token that `self[0]` is for, if an answer continues an earlier one.
        """
        self._key = np.array([seed, key], dtype=np.uint64)
        self._sample = sample
        self._start = start
        self._first = -1
        self._block: list[float] = []

    def __getitem__(self, token: int) -> float:
        token += self._start
        first = token - token % _AHEAD
        if first != self._first:
            counter = np.array([first // 4, self._sample, 0, 0], dtype=np.uint64)
            raw = Philox(key=self._key, counter=counter).random_raw(_AHEAD)
            self._block = ((raw >> np.uint64(11)) * 2.0**-53).tolist()
            self._first = first
        return self._block[token - first]


class Draw(NamedTuple):
    """A token, with the entropies and probabilities of its draw."""

    token: int
    entropy_before: float
    """Nats, of softmax(logits) after penalties."""
    entropy_after: float
    """Nats, after the EM step; equal to `entropy_before` if it did nothing."""
    steps: int
    """EM steps taken."""
    p_before: float
    """The token's probability before the EM step, temperature and truncation."""
    p_after: float
    """The token's probability after the EM step, before temperature and truncation."""
    token_without_em: int
    """The token that the same uniform would have drawn without the EM step."""


def certain(token: int) -> Draw:
    """Returns the draw of the only token that is legal."""
    return Draw(token, 0.0, 0.0, 0, 1.0, 1.0, token)


COLDEST = 1e-9
"""The lowest temperature besides 0: logits closer than this are ties, and nothing overflows."""


def probabilities(logits: Float64, params: SamplingParams) -> Float64:
    """Returns the distribution that a token is drawn from, [V], given the logits after EM, [V]."""
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
    """Returns how many of these weights, largest first, it takes to reach the share `top_p` of `total`."""
    if top_p >= 1:
        return len(weights)
    return int(np.searchsorted(np.cumsum(weights), top_p * total, side="left")) + 1


def inverse_cdf(weights: Float64, u: float) -> int:
    """Returns the first index whose cumulative weight exceeds u times the total; u in [0, 1)."""
    cumulative = np.cumsum(weights)
    i = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    if i == len(weights):  # u·total rounded up to the total
        i = int(np.flatnonzero(weights)[-1])
    return i


Float32 = NDArray[np.float32]
Mask = NDArray[np.uint8]
"""The legal tokens, one bit each: token i in bit i % 8 of byte i // 8; at least ⌈V / 8⌉ bytes."""


def illegal(mask: Mask, vocabulary: int) -> NDArray[np.bool_]:
    """Returns which tokens must not be drawn, [V]."""
    bits: NDArray[np.uint8] = np.unpackbits(mask, count=vocabulary, bitorder="little")
    found: NDArray[np.bool_] = bits == 0
    return found


def adjust(row: Float32, params: SamplingParams, seen: Sequence[int]) -> Float32:
    """Returns a copy of `row` with penalties, then biases, applied; `row` itself if there are none.

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
    """Returns how often each token occurs among those that the penalties count; empty if none apply."""
    if not (params.penalizes and seen):
        return {}
    return Counter(seen if params.repeat_last_n < 0 else seen[-params.repeat_last_n :])
