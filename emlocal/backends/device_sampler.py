"""Sampling on the device of the logits: the half that torch and mlx share, which runs on the host.

It groups rows of like settings into blocks, turns their settings into columns, and reads the table of draws
that comes back. A block always has the same shape, and is filled up with copies if need be. Kernels choose
their order of summation by the shape, so no bit of a row's result depends on the rows beside it. Blocks also
bound the memory.

The arithmetic on the device's arrays exists twice (`sampler` of each engine): torch computes in float64. mlx
has no float64 on GPUs; it sums 64-bit integers and compiles a block as one function.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emlocal.backends.base import Row
from emlocal.em import EMStep
from emlocal.em.steps import AdaptiveTemperature, EMInf
from emlocal.errors import LogitsError, UsageError
from emlocal.sampling import Draw, Mask, SamplingParams
from emlocal.sampling.draw import counted_tokens

NAN, INFINITE, MASKED = -1, -2, -3
"""The codes that a kernel writes in place of the token if the row is not a distribution."""
_FAULTS = {
    NAN: "the logits contain NaN",
    INFINITE: "the logits contain +inf",
    MASKED: "every token of a row is masked",
}


def kernel_of(step: EMStep | None) -> str | None:
    """Returns the name of the kernel that takes an EM step on a device; "none" without a step.

    None if there is no kernel: such rows are drawn on the host, by the step's reference.
    """
    if step is None:
        return "none"
    if type(step) is AdaptiveTemperature:
        return "adaptive"
    if type(step) is EMInf:
        return "adam" if step.optimizer == "adam" else "sgd+kl" if step.kl_weight else "sgd"
    return None


def most_steps(step: EMStep | None) -> int:
    """Returns the number of rounds that a kernel must run."""
    return step.steps if type(step) is EMInf else 0


def columns(rows: Sequence[Row]) -> NDArray[np.float64]:
    """Returns the settings of rows as columns, float64 [11, B].

    They are temperature, its dynamic range and exponent, top-k, top-p, min-p; the EM step's threshold, steps,
    learning rate and KL weight; and adaptive temperature's ratio.
    """
    out = np.zeros((11, len(rows)))
    for i, row in enumerate(rows):
        p, step = row.params, row.params.em
        out[:6, i] = (p.temperature, p.dynatemp_range, p.dynatemp_exponent, p.top_k, p.top_p, p.min_p)
        if type(step) is AdaptiveTemperature:
            out[[6, 10], i] = step.threshold, step.ratio
        elif type(step) is EMInf:
            out[6:10, i] = step.threshold, step.steps, step.learning_rate, step.kl_weight
    return out


def penalized(rows: Sequence[Row]) -> list[tuple[int, int, float, SamplingParams]]:
    """Returns (row, token, times seen, settings) of every logit that penalties change."""
    return [
        (i, token, float(times), row.params)
        for i, row in enumerate(rows)
        for token, times in counted_tokens(row.params, row.seen).items()
    ]


def biased(rows: Sequence[Row], vocabulary: int) -> list[tuple[int, int, float]]:
    """Returns (row, token, bias), each token of a row once. Raises UsageError for an unknown token."""
    total: dict[tuple[int, int], float] = {}
    for i, row in enumerate(rows):
        for token, bias in row.params.logit_bias:
            if token >= vocabulary:
                raise UsageError(
                    f"--logit-bias names token {token}; the model's tokens are 0 to {vocabulary - 1}"
                )
            total[i, token] = total.get((i, token), 0.0) + bias
    return [(i, token, bias) for (i, token), bias in total.items()]


def legal_bits(rows: Sequence[Row], vocabulary: int) -> Mask | None:
    """Returns the rows' masks, uint8 [B, ⌈V/8⌉], all bits set for a row without one; None if none has one."""
    if all(row.legal is None for row in rows):
        return None
    bits = np.full((len(rows), -(-vocabulary // 8)), 255, dtype=np.uint8)
    for own, row in zip(bits, rows, strict=True):
        if row.legal is not None:
            own[:] = row.legal[: len(own)]
    return bits


Run = Callable[[Any, Sequence[int], Sequence[int]], Any]


class DeviceSampler(ABC):
    """A sampler of tokens from rows of one vocabulary on one device."""

    vocabulary: int
    block: int
    """Rows of a block."""

    def sample(self, logits: Any, at: Sequence[int], rows: Sequence[Row]) -> list[Draw]:
        """Draws a token for each row.

        Args:
            logits: float32 [N, V], an array of the device's, not changed.
            at: the index of each row's logits in these.
            rows: with EM steps that `kernel_of` knows.
        Raises:
            LogitsError: a row is not a distribution.
            UsageError: a logit bias names a token that the model does not have.
        """
        run = self._begin(logits, at, rows)
        groups: dict[Hashable, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(self._structure(row.params), []).append(i)
        order: list[int] = []
        outcomes = []
        for structure, members in groups.items():
            for first in range(0, len(members), self.block):
                block = members[first : first + self.block]
                full = (block * self.block)[: self.block]
                outcomes.append(run(structure, block, full))
                order += [*block, *[-1] * (self.block - len(block))]
        table = self._fetch(outcomes)
        draws = {i: values for i, values in zip(order, table, strict=True) if i >= 0}
        return [_draw(draws[i]) for i in range(len(rows))]

    @abstractmethod
    def _structure(self, params: SamplingParams) -> Hashable:
        """Returns a key that is the same for all rows of a block."""

    @abstractmethod
    def _begin(self, logits: Any, at: Sequence[int], rows: Sequence[Row]) -> Run:
        """Returns a function that computes one block.

        It takes the structure, the rows' indices, and the same indices filled up to a whole block. It returns
        the fields of Draw, [block, 7], with a fault in place of the token if there is one.
        """

    @abstractmethod
    def _fetch(self, outcomes: Sequence[Any]) -> NDArray[Any]:
        """Returns all blocks' results on the host, in one transfer."""


def _draw(values: NDArray[Any]) -> Draw:
    token, before, after, steps, p_before, p_after, without = values.tolist()
    if token < 0:
        raise LogitsError(_FAULTS[int(token)])
    return Draw(int(token), before, after, int(steps), p_before, p_after, int(without))
