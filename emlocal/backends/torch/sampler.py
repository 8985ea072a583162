"""From rows of logits on a device to tokens, with one transfer to the host at the end.

What emlocal.sampling.reference does row by row, on blocks of rows, in float64. The host's half is
emlocal.backends.device_sampler.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from emlocal.backends import device_sampler
from emlocal.backends.base import Row
from emlocal.backends.device_sampler import INFINITE, MASKED, NAN, DeviceSampler, Run, kernel_of, most_steps
from emlocal.backends.torch import kernels
from emlocal.backends.torch.kernels import GROUP, TOP, Truncation, choose
from emlocal.sampling import SamplingParams

CPU_ROWS, CUDA_ROWS = 2, 16
"""Rows of a block; 16 rows of 151,936 tokens take 19 MB each time they are written down."""


class TorchSampler(DeviceSampler):
    """See DeviceSampler."""

    def __init__(
        self, vocabulary: int, device: torch.device, warn: Callable[[str], None] = lambda message: None
    ) -> None:
        """`warn` is told once if the EM step cannot be compiled."""
        self.vocabulary = vocabulary
        self.device = device
        self.block = CPU_ROWS if device.type == "cpu" else CUDA_ROWS
        self._padded = -(-vocabulary // GROUP) * GROUP
        self._descend: kernels.Step = kernels.descend if device.type == "cpu" else Compiled(warn)

    def _structure(self, params: SamplingParams) -> tuple[str | None, int]:
        return kernel_of(params.em), _largest(params, self.vocabulary)

    def _begin(self, logits: Tensor, at: Sequence[int], rows: Sequence[Row]) -> Run:
        settings = torch.from_numpy(_columns(rows)).to(self.device)

        def run(structure: tuple[str, int], block: Sequence[int], full: Sequence[int]) -> Tensor:
            index = torch.tensor([[at[i] for i in full], full], device=self.device)
            z = adjusted(logits[index[0]], [rows[i] for i in block])
            rounds = max(most_steps(rows[i].params.em) for i in full)
            return self._sample_block(z, settings[:, index[1], None], *structure, rounds)

        return torch.inference_mode()(run)

    def _fetch(self, outcomes: Sequence[Any]) -> NDArray[np.float64]:
        table: NDArray[np.float64] = torch.cat(list(outcomes)).cpu().numpy()
        return table

    def _sample_block(self, raw: Tensor, columns: Tensor, kind: str, largest: int, rounds: int) -> Tensor:
        """float32 [R, V] → float64 [R, 7]: the fields of Draw, or a fault in place of the token."""
        top = raw.amax(-1, keepdim=True)  # NaN wins every max
        fault = torch.where(
            top.isnan(), NAN, torch.where(top.isposinf(), INFINITE, torch.where(top.isneginf(), MASKED, 0))
        )
        z0 = torch.where(fault < 0, 0.0, raw).double()
        z0 = (z0 - z0.amax(-1, keepdim=True)).clamp_min(kernels.FLOOR)
        if self._padded > self.vocabulary:
            z0 = pad(z0, (0, self._padded - self.vocabulary), value=kernels.FLOOR)
        truncation, descent, ratio = Truncation(*columns[:7]), kernels.Descent(*columns[7:11]), columns[11]
        sharpened = self._sharpen(z0, kind, descent, ratio, rounds)
        token = choose(sharpened.z, sharpened.entropy_after, truncation, self.vocabulary, largest)
        without, p_before = token, _probability(z0, token)
        p_after = p_before
        if kind != "none":
            without = choose(z0, sharpened.entropy_before, truncation, self.vocabulary, largest)
            p_after = torch.where(sharpened.steps > 0, _probability(sharpened.z, token), p_before)
        columns_out = (
            torch.where(fault < 0, fault, token),
            sharpened.entropy_before,
            sharpened.entropy_after,
            sharpened.steps,
            p_before,
            p_after,
            without,
        )
        return torch.cat([column.double() for column in columns_out], dim=-1)

    def _sharpen(
        self, z: Tensor, kind: str, descent: kernels.Descent, ratio: Tensor, rounds: int
    ) -> kernels.Sharpened:
        if kind == "sgd":
            return kernels.gradient_descent(z, descent, rounds, self._descend)
        if kind == "sgd+kl":
            return kernels.gradient_descent_with_kl(z, descent, rounds)
        if kind == "adam":
            return kernels.adam(z, descent, rounds)
        if kind == "adaptive":
            return kernels.adaptive_temperature(z, ratio, descent.threshold)
        H = kernels.entropy(z)
        return kernels.Sharpened(z, H, H, torch.zeros_like(H))


class Compiled:
    """`kernels.descend` through torch.compile; as it is where that fails, which `warn` is told once."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._step: kernels.Step = torch.compile(kernels.descend, dynamic=False)
        self._proven = False

    def __call__(
        self, z: Tensor, threshold: Tensor, allowed: Tensor, rate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._proven:
            return self._step(z, threshold, allowed, rate)
        try:
            done = self._step(z, threshold, allowed, rate)
        except (RuntimeError, ImportError, OSError) as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self._warn(f"torch.compile failed ({why}); the EM step runs uncompiled, which is slower")
            self._step = kernels.descend
            done = self._step(z, threshold, allowed, rate)
        self._proven = True
        return done


def _columns(rows: Sequence[Row]) -> NDArray[np.float64]:
    """float64 [12, B]: u, and what `device_sampler.columns` has."""
    return np.concatenate([np.array([[row.u for row in rows]]), device_sampler.columns(rows)])


def _largest(params: SamplingParams, vocabulary: int) -> int:
    """Of how many tokens the row needs the order; see `choose`."""
    if 0 < params.top_k <= TOP:
        return TOP
    return vocabulary + GROUP if params.top_p < 1 or 0 < params.top_k < vocabulary else 0


def adjusted(block: Tensor, rows: Sequence[Row]) -> Tensor:
    """Penalties, then biases, on the first rows of a block, float32 [R, V], in place."""
    entries = device_sampler.penalized(rows)
    if entries:
        where = torch.tensor([(i, token) for i, token, *_ in entries], device=block.device).T
        values = [(n, p.repeat_penalty, p.presence_penalty, p.frequency_penalty) for *_, n, p in entries]
        times, repeat, presence, frequency = torch.tensor(values, device=block.device).T
        old = block[where[0], where[1]]
        new = torch.where(old > 0, old / repeat, old * repeat) - presence - frequency * times
        block[where[0], where[1]] = new
    biases = device_sampler.biased(rows, block.shape[1])
    if biases:
        where = torch.tensor([(i, token) for i, token, _ in biases], device=block.device).T
        block[where[0], where[1]] += torch.tensor([bias for *_, bias in biases], device=block.device)
    return block


def _probability(z: Tensor, token: Tensor) -> Tensor:
    """softmax(z) at the token, [R, 1]."""
    shifted = z - z.amax(-1, keepdim=True)
    return shifted.gather(-1, token).exp() / shifted.exp().sum(-1, keepdim=True)
