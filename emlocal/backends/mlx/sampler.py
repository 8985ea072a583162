"""From rows of logits on a device to tokens: one compiled function, and one small transfer to the host.

What emlocal.sampling.reference does row by row, on blocks of rows, in float32 and 64-bit integers. Tokens are
the reference's unless u lies within EDGE of a border of its CDF. The host's half is
emlocal.backends.device_sampler.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from emlocal.backends import device_sampler
from emlocal.backends.base import Row
from emlocal.backends.device_sampler import INFINITE, MASKED, NAN, DeviceSampler, Run, kernel_of, most_steps
from emlocal.backends.mlx import kernels
from emlocal.backends.mlx.kernels import MOST_TOKENS, Fractions, Truncation, choose
from emlocal.errors import ModelError
from emlocal.sampling import SamplingParams

EDGE = 2e-6
"""Tested: how near a border of the exact CDF u may lie for another token to be drawn."""
CPU_ROWS, GPU_ROWS = 2, 4
"""Rows of a block."""
Block = Callable[[mx.array, mx.array, mx.array], mx.array]


class MLXSampler(DeviceSampler):
    """See DeviceSampler."""

    def __init__(self, vocabulary: int, *, on_gpu: bool) -> None:
        """Raises ModelError for more than 524,288 tokens, whose sums would not fit 64 bits."""
        if vocabulary > MOST_TOKENS:
            raise ModelError(
                f"the model has {vocabulary:,} tokens; on GPUs mlx draws from {MOST_TOKENS:,} at most"
            )
        self.vocabulary = vocabulary
        self.block = GPU_ROWS if on_gpu else CPU_ROWS
        self._compiled: dict[Hashable, Block] = {}

    def _structure(self, params: SamplingParams) -> Hashable:
        """What a function is compiled for: the EM step's kernel, whether rows need a sort, the rounds."""
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
    fault = mx.where(top == -mx.inf, MASKED, mx.where(top == mx.inf, INFINITE, 0))
    fault = mx.where(mx.isnan(raw).any(axis=-1, keepdims=True), NAN, fault)
    z0 = mx.where(fault < 0, 0.0, raw)
    z0 = mx.maximum(z0 - z0.max(axis=-1, keepdims=True), kernels.FLOOR)
    z0 = mx.pad(z0, [(0, 0), (0, -vocabulary % kernels.GROUP)], constant_values=kernels.FLOOR)
    truncation, descent, ratio = Truncation(*columns[:6]), kernels.Descent(*columns[6:10]), columns[10]
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


def _sharpen(
    z: mx.array, kind: str, descent: kernels.Descent, ratio: mx.array, rounds: int
) -> kernels.Sharpened:
    if kind in ("sgd", "sgd+kl"):
        return kernels.gradient_descent(z, descent, rounds, with_kl=kind == "sgd+kl")
    if kind == "adam":
        return kernels.adam(z, descent, rounds)
    if kind == "adaptive":
        return kernels.adaptive_temperature(z, ratio, descent.threshold)
    H = kernels.entropy(z)
    return kernels.Sharpened(z, H, H, mx.zeros_like(H))


def _fractions(rows: Sequence[Row]) -> NDArray[np.uint64]:
    """uint64 [2, B]: u and top-p, in units of 2⁻⁶⁴; exact."""
    wanted = [
        [int(row.u * 2**64) for row in rows],
        [int(min(row.params.top_p, 1 - 2**-53) * 2**64) for row in rows],
    ]
    return np.array(wanted, dtype=np.uint64)


def adjusted(block: mx.array, rows: Sequence[Row]) -> mx.array:
    """Penalties, then biases, on the first rows of a block of its own, float32 [R, V]."""
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
    return block


def _probability(z: mx.array, token: mx.array) -> mx.array:
    """softmax(z) at the token, [R, 1]."""
    shifted = z - z.max(axis=-1, keepdims=True)
    return mx.exp(mx.take_along_axis(shifted, token, axis=-1)) / kernels.total(mx.exp(shifted))
