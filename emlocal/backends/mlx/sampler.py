"""From rows of logits on a device to tokens: one compiled function, and one small transfer to the host.

What emlocal.sampling.reference does row by row, on blocks of rows, in float32 and 64-bit integers. Tokens are
the reference's unless u lies within EDGE of a border of its CDF. A block always has the same shape, filled up
with copies if need be: kernels choose their order of summation by the shape, and so a row's outcome does not
depend, in any bit, on the rows beside it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from emlocal.backends.base import Row
from emlocal.backends.mlx import em
from emlocal.backends.mlx.draw import MOST_TOKENS, Fractions, Truncation, choose
from emlocal.em import AdaptiveTemperature
from emlocal.errors import LogitsError, ModelError, UsageError
from emlocal.sampling import Draw, SamplingParams

EDGE = 2e-6
"""Tested: how near a border of the exact CDF u may lie for another token to be drawn."""
CPU_ROWS, GPU_ROWS = 2, 4
"""Rows of a block."""
_FAULTS = {-1: "the logits contain NaN", -2: "the logits contain +inf", -3: "every token of a row is masked"}
_FIELDS = 11
Block = Callable[[mx.array, mx.array, mx.array], mx.array]


class MLXSampler:
    """Draws tokens from rows of one vocabulary."""

    def __init__(self, vocabulary: int, *, on_gpu: bool) -> None:
        """Raises ModelError for more than 524,288 tokens, whose sums would not fit 64 bits."""
        if vocabulary > MOST_TOKENS:
            raise ModelError(
                f"the model has {vocabulary:,} tokens; on GPUs mlx draws from {MOST_TOKENS:,} at most"
            )
        self.vocabulary = vocabulary
        self.block = GPU_ROWS if on_gpu else CPU_ROWS
        self._compiled: dict[tuple[str, bool, int], Block] = {}

    def sample(self, logits: mx.array, at: Sequence[int], rows: Sequence[Row]) -> list[Draw]:
        """A token for each row.

        Args:
            logits: float32 [N, V], not changed.
            at: the index of each row's logits in these.
        Raises:
            LogitsError: a row is no distribution.
            UsageError: a logit bias names a token that the model does not have.
        """
        settings, fractions = _settings(rows), _fractions(rows)
        groups: dict[tuple[str, bool, int], list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(_structure(row.params, self.vocabulary), []).append(i)
        order: list[int] = []
        outcomes: list[mx.array] = []
        for structure, members in groups.items():
            for first in range(0, len(members), self.block):
                block = members[first : first + self.block]
                full = (block * self.block)[: self.block]
                raw = adjusted(logits[mx.array([at[i] for i in full])], [rows[i] for i in block])
                columns = mx.array(settings[:, full, None]), mx.array(fractions[:, full, None])
                outcomes.append(self._function(structure)(raw, *columns))
                order += [*block, *[-1] * (self.block - len(block))]
        table = np.array(mx.concatenate(outcomes))
        draws = {i: values for i, values in zip(order, table, strict=True) if i >= 0}
        return [_draw(draws[i]) for i in range(len(rows))]

    def _function(self, structure: tuple[str, bool, int]) -> Block:
        """`sample_block` for rows whose settings have this structure, compiled on its first use."""
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
    """float32 [R, V] → float32 [R, 7]: the fields of Draw, or a fault in place of the token.

    `columns` are the settings, float32 [11, R, 1]; `fractions` uint64 [2, R, 1].
    """
    top = raw.max(axis=-1, keepdims=True)
    fault = mx.where(top == -mx.inf, -3, mx.where(top == mx.inf, -2, 0))
    fault = mx.where(mx.isnan(raw).any(axis=-1, keepdims=True), -1, fault)
    z0 = mx.where(fault < 0, 0.0, raw)
    z0 = mx.maximum(z0 - z0.max(axis=-1, keepdims=True), em.FLOOR)
    z0 = mx.pad(z0, [(0, 0), (0, -vocabulary % em.GROUP)], constant_values=em.FLOOR)
    truncation, descent, ratio = Truncation(*columns[:6]), em.Descent(*columns[6:10]), columns[10]
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


def _sharpen(z: mx.array, kind: str, descent: em.Descent, ratio: mx.array, rounds: int) -> em.Sharpened:
    if kind in ("sgd", "sgd+kl"):
        return em.gradient_descent(z, descent, rounds, with_kl=kind == "sgd+kl")
    if kind == "adam":
        return em.adam(z, descent, rounds)
    if kind == "adaptive":
        return em.adaptive_temperature(z, ratio, descent.threshold)
    H = em.entropy(z)
    return em.Sharpened(z, H, H, mx.zeros_like(H))


def _structure(params: SamplingParams, vocabulary: int) -> tuple[str, bool, int]:
    """What a compiled function is made for: the EM step's kind, whether the row needs a sort, its rounds."""
    ordered = params.top_p < 1 or 0 < params.top_k < vocabulary
    step = params.em
    if step is None:
        return "none", ordered, 0
    if isinstance(step, AdaptiveTemperature):
        return "adaptive", ordered, 0
    kind = "adam" if step.optimizer == "adam" else "sgd+kl" if step.kl_weight else "sgd"
    return kind, ordered, step.steps


def _settings(rows: Sequence[Row]) -> NDArray[np.float32]:
    """float32 [11, B]: Truncation's fields, Descent's, and the ratio of adaptive temperature."""
    out = np.zeros((_FIELDS, len(rows)), dtype=np.float32)
    for i, row in enumerate(rows):
        p, step = row.params, row.params.em
        out[:6, i] = (p.temperature, p.dynatemp_range, p.dynatemp_exponent, p.top_k, p.top_p, p.min_p)
        if isinstance(step, AdaptiveTemperature):
            out[[6, 10], i] = step.threshold, step.ratio
        elif step is not None:
            out[6:10, i] = step.threshold, step.steps, step.learning_rate, step.kl_weight
    return out


def _fractions(rows: Sequence[Row]) -> NDArray[np.uint64]:
    """uint64 [2, B]: u and top-p, in units of 2⁻⁶⁴; exact."""
    wanted = [
        [int(row.u * 2**64) for row in rows],
        [int(min(row.params.top_p, 1 - 2**-53) * 2**64) for row in rows],
    ]
    return np.array(wanted, dtype=np.uint64)


def adjusted(block: mx.array, rows: Sequence[Row]) -> mx.array:
    """Penalties, then biases, on the first rows of a block of its own, float32 [R, V]."""
    entries = [(i, token, times, row.params) for i, row in enumerate(rows) for token, times in _seen(row)]
    if entries:
        at, tokens = mx.array([i for i, *_ in entries]), mx.array([token for _, token, *_ in entries])
        times = mx.array([float(n) for *_, n, _ in entries])
        repeat = mx.array([p.repeat_penalty for *_, p in entries])
        minus = mx.array([p.presence_penalty for *_, p in entries])
        frequency = mx.array([p.frequency_penalty for *_, p in entries])
        old = block[at, tokens]
        block[at, tokens] = mx.where(old > 0, old / repeat, old * repeat) - minus - frequency * times
    biases = [(i, token, bias) for i, row in enumerate(rows) for token, bias in _biases(row, block.shape[1])]
    if biases:
        at, tokens = mx.array([i for i, *_ in biases]), mx.array([token for _, token, _ in biases])
        block[at, tokens] = block[at, tokens] + mx.array([bias for *_, bias in biases])
    return block


def _seen(row: Row) -> Iterable[tuple[int, int]]:
    """(token, times) that the row's penalties act on."""
    if not (row.params.penalizes and row.seen):
        return ()
    last = row.params.repeat_last_n
    return Counter(row.seen if last < 0 else row.seen[-last:]).items()


def _biases(row: Row, vocabulary: int) -> Iterable[tuple[int, float]]:
    """(token, bias), each token once. Raises UsageError for a token that is not there."""
    total: dict[int, float] = {}
    for token, bias in row.params.logit_bias:
        if token >= vocabulary:
            raise UsageError(
                f"--logit-bias names token {token}; the model's tokens are 0 to {vocabulary - 1}"
            )
        total[token] = total.get(token, 0.0) + bias
    return total.items()


def _probability(z: mx.array, token: mx.array) -> mx.array:
    """softmax(z) at the token, [R, 1]."""
    shifted = z - z.max(axis=-1, keepdims=True)
    return mx.exp(mx.take_along_axis(shifted, token, axis=-1)) / em.total(mx.exp(shifted))


def _draw(values: NDArray[np.float32]) -> Draw:
    token, before, after, steps, p_before, p_after, without = values.tolist()
    if token < 0:
        raise LogitsError(_FAULTS[int(token)])
    return Draw(int(token), before, after, int(steps), p_before, p_after, int(without))
