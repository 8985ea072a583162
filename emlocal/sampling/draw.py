"""A draw: its random number, and what came of it.

There is one uniform per token, addressed by what it is for, not by when it is asked for.

u = Philox4x64-10 with key (seed, request key) and counter (token index, sample index). A draw therefore does
not depend on the batch, the engine, or what was drawn before; a resumed run repeats itself; and two
samplers run on the same request share their draws.
Source: Salmon et al. 2011; numpy.random.Philox, whose raw stream NumPy keeps stable.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from numpy.random import Philox

_AHEAD = 64  # tokens per refill; each counter value gives four


def request_key(name: str) -> int:
    """The 64-bit key of a request's name (its `custom_id`, say)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class Uniforms:
    """The uniforms of one sample of one request. `self[t]` is token t's, a float in [0, 1)."""

    def __init__(self, seed: int, key: int = 0, sample: int = 0, start: int = 0) -> None:
        """`start`: the token that `self[0]` is for, where an answer goes on that was begun before."""
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
    """A token and how it came to be chosen."""

    token: int
    entropy_before: float
    """Nats, of softmax(logits) after penalties."""
    entropy_after: float
    """Nats, after the EM step; equal to `entropy_before` where it did nothing."""
    steps: int
    """EM steps taken."""
    p_before: float
    """The token's probability before the EM step …"""
    p_after: float
    """… and after it; both before temperature and truncation."""
    token_without_em: int
    """What the same uniform would have drawn without the EM step."""
