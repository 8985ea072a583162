"""A row of logits split into a head, held token by token, and a tail, held as sums.

One float32 sweep over the row gives weights w_i = exp(z_i − max z). Tokens with w_i > `cutoff` form the head
(some hundreds of 151,936 in practice), in float64. The others are the tail, kept as the sums that the EM
steps need. After the sweep a step costs O(head), whatever V is. `emlocal.em.fast` takes the steps, and bounds
its distance from the full-vocabulary reference.

The tail's weights stay in the sweep's buffer, summed by blocks of 128 tokens. A draw by inverse CDF in token
order therefore needs no cumulative sum over the vocabulary.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emlocal.em.entropy import Float64, checked

BLOCK = 128
CUTOFFS = (1e-6, 1e-8, 1e-9)
"""Cutoffs, tried in turn until the bound on the error is small enough.

Gradient descent passes at the first.
"""
PLAIN_RANGE = (-15.0, 40.0)
"""The range of largest logits that need no shift: exp and its squares stay well inside float32."""
UNDERFLOW = np.float32(-200.0)  # in float32, exp is 0 long before; replaces −inf in products with w = 0

Float32 = NDArray[np.float32]


TOLERANCE = 9e-6
"""The largest bound on the total variation that is accepted; the contract is 1e-5."""
ROUNDING = 5e-7
"""Relative error of the tail's float32 sums: 2.5 ulp in exp, and sums of 128."""
ROUNDING64 = 1e-14
"""The most that a step's float64 arithmetic may add to a logit's error, here and in the reference."""
HIGHEST = 80.0
"""The largest exponent after EM at which no sum overflows; larger ones are left to the reference."""


class Sharpened(NamedTuple):
    """A split row after EM."""

    head: Float64
    """New exponents of the head, [n]."""
    tail_factor: float
    tail_power: float
    """A tail token's new weight is tail_factor · w^tail_power."""
    tail_mass: float
    """Σ of the tail's new weights."""
    partition: float
    """Σ of all new weights."""
    entropy_before: float
    entropy_after: float
    steps: int


class SquaredTail(NamedTuple):
    """Q_k = Σ_tail w² s^k for k = 0, 1, 2: to first order, the effect of gradient descent on the tail."""

    Q0: float
    Q1: float
    Q2: float


@dataclass(frozen=True)
class Split:
    """One row's distribution. Weights w and exponents s = log w are relative to the row's largest logit."""

    index: NDArray[np.intp]
    """Token ids of the head, ascending, int [n]."""
    head: Float64
    """s of the head, [n]; the largest is 0."""
    tail_mass: float
    """Σ_tail w."""
    tail_moment: float
    """Σ_tail w·s."""
    blocks: Float64
    """Σ_tail w within each block of 128 token ids, [⌈V/128⌉]."""
    tail: Float32
    """Each token's weight from the sweep, 0 for the head's, [V padded to whole blocks]; a view."""
    scale: float
    """w = scale · tail."""
    row: Float32
    """The exponents that the sweep used, −inf where masked, [V]; a view."""
    offset: float
    """s = row − offset."""
    cutoff: float
    """Every token with w > cutoff is in the head, and no other."""
    partition: float
    """S = Σ w over the whole row."""
    entropy: float
    """H of the row in nats: log S − (Σ w s)/S."""

    def untouched(self) -> Sharpened:
        """Returns the row without a change."""
        H = self.entropy
        return Sharpened(self.head, 1.0, 1.0, self.tail_mass, self.partition, H, H, 0)

    def squared_tail(self) -> SquaredTail:
        """Returns the tail's second moments, by one more sweep. Only steps of gradient descent need them."""
        tail = self.tail[: len(self.row)]
        with np.errstate(invalid="ignore"):
            product = tail * self.row
        # they make corrections of second order, so float32 sums are enough
        q0, q1, q2 = float(tail @ tail), float(product @ tail), float(product @ product)
        if not math.isfinite(q1):  # masked tokens: 0·(−inf)
            product = tail * np.maximum(self.row, UNDERFLOW)
            q1, q2 = float(product @ tail), float(product @ product)
        c = self.offset  # s = row − c
        moments = (q0, q1 - c * q0, q2 - 2 * c * q1 + c * c * q0)
        return SquaredTail(*(q * self.scale**2 for q in moments))

    def light_tail_mass(self, weight: float) -> float:
        """Returns Σ_tail w·f with f = weight/(w + weight): a soft sum over tokens lighter than `weight`."""
        epsilon = np.float32(min(weight / self.scale, 1e30))
        share = self.tail + epsilon
        np.divide(self.tail, share, out=share)
        return weight * float(share.sum(dtype=np.float64))


class Splitter:
    """A splitter of rows of one vocabulary. Rows are float32 [V]: what the engines produce.

    It owns the buffers, so a Split is valid until the next call of `split`. Not for use from two threads at
    once.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._weights = np.zeros(-(-vocabulary // BLOCK) * BLOCK, dtype=np.float32)
        self._shifted = np.empty(vocabulary, dtype=np.float32)
        self._in_head = np.empty(vocabulary, dtype=np.bool_)
        self._ones = np.ones(BLOCK, dtype=np.float32)

    def split(self, row: Float32, cutoff: float = CUTOFFS[0]) -> Split:
        """Splits `row`, float32 [V], in one sweep; the result may be a view of it.

        Raises LogitsError as `emlocal.em.entropy.checked` does.
        """
        top = float(row.max())
        if not math.isfinite(top):
            checked(row)
        head_row, top_of_row = row, top
        if not PLAIN_RANGE[0] < top < PLAIN_RANGE[1]:
            with np.errstate(over="ignore"):  # −3e38 − 3e38
                row, top = np.subtract(row, np.float32(top), out=self._shifted), 0.0
        weights = self._weights[: self.vocabulary]
        np.exp(row, out=weights)
        np.greater(weights, np.float32(cutoff * math.exp(top)), out=self._in_head)
        index = np.flatnonzero(self._in_head)
        weights[index] = 0.0

        moment = _dot(weights, row)
        if not math.isfinite(moment):  # masked tokens: 0·(−inf)
            moment = _dot(weights, np.maximum(row, UNDERFLOW))
        scale = math.exp(-top)
        blocks = np.vecdot(self._weights.reshape(-1, BLOCK), self._ones).astype(np.float64) * scale
        mass = float(blocks.sum())
        head = head_row[index].astype(np.float64) - top_of_row
        moment = moment * scale - top * mass
        w = np.exp(head)
        S = float(w.sum()) + mass
        H = max(0.0, math.log(S) - (float(w @ head) + moment) / S)
        return Split(index, head, mass, moment, blocks, self._weights, scale, row, top, cutoff, S, H)


def _dot(a: Float32, b: Float32) -> float:
    """Returns a·b: float32 within blocks, float64 across them, so that the error does not grow with V."""
    whole = len(a) // BLOCK * BLOCK
    with np.errstate(invalid="ignore"):  # 0·(−inf) where tokens are masked; the caller checks for it
        blocks = np.vecdot(a[:whole].reshape(-1, BLOCK), b[:whole].reshape(-1, BLOCK))
        return float(blocks.sum(dtype=np.float64)) + float(a[whole:] @ b[whole:])
