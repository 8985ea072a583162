"""From rows of logits on a device to tokens, with one transfer to the host at the end.

What emlocal.sampling.reference does row by row, on blocks of rows, in float64. A block always has the same
shape, filled up with copies if need be: kernels choose their order of summation by the shape, and so a row's
outcome does not depend, in any bit, on the rows beside it. It also bounds the memory.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from emlocal import console
from emlocal.backends.base import Row
from emlocal.backends.torch import em
from emlocal.backends.torch.draw import GROUP, TOP, Truncation, choose
from emlocal.em import AdaptiveTemperature
from emlocal.errors import LogitsError, UsageError
from emlocal.sampling import Draw, SamplingParams

CPU_ROWS, CUDA_ROWS = 2, 16
"""Rows of a block; 16 rows of 151,936 tokens take 19 MB each time they are written down."""
_FAULTS = {-1: "the logits contain NaN", -2: "the logits contain +inf", -3: "every token of a row is masked"}


class TorchSampler:
    """Draws tokens from rows of one vocabulary on one device."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        self.vocabulary = vocabulary
        self.device = device
        self.block = CPU_ROWS if device.type == "cpu" else CUDA_ROWS
        self._padded = -(-vocabulary // GROUP) * GROUP
        self._descend: em.Step = em.descend if device.type == "cpu" else Compiled()

    @torch.inference_mode()
    def sample(self, logits: Tensor, at: Sequence[int], rows: Sequence[Row]) -> list[Draw]:
        """A token for each row.

        Args:
            logits: float32 [N, V], not changed.
            at: the index of each row's logits in these.
        Raises:
            LogitsError: a row is no distribution.
            UsageError: a logit bias names a token that the model does not have.
        """
        settings = torch.from_numpy(_settings(rows)).to(self.device)
        groups: dict[tuple[str, int], list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault((em_kind(row.params), _largest(row.params, self.vocabulary)), []).append(i)
        order: list[int] = []
        outcomes: list[Tensor] = []
        for (kind, largest), members in groups.items():
            for block in _blocks(members, self.block):
                full = (block * self.block)[: self.block]
                index = torch.tensor([[at[i] for i in full], full], device=self.device)
                z = adjusted(logits[index[0]], [rows[i] for i in block])
                outcomes.append(self._sample_block(z, settings[:, index[1], None], kind, largest, full, rows))
                order += [*block, *[-1] * (self.block - len(block))]
        table = torch.cat(outcomes).cpu().numpy()
        draws = {i: values for i, values in zip(order, table, strict=True) if i >= 0}
        return [_draw(draws[i]) for i in range(len(rows))]

    def _sample_block(
        self, raw: Tensor, columns: Tensor, kind: str, largest: int, full: Sequence[int], rows: Sequence[Row]
    ) -> Tensor:
        """float32 [R, V] → float64 [R, 7]: the fields of Draw, or a fault in place of the token."""
        top = raw.amax(-1, keepdim=True)  # NaN wins every max
        fault = torch.where(
            top.isnan(), -1, torch.where(top.isposinf(), -2, torch.where(top.isneginf(), -3, 0))
        )
        z0 = torch.where(fault < 0, 0.0, raw).double()
        z0 = (z0 - z0.amax(-1, keepdim=True)).clamp_min(em.FLOOR)
        if self._padded > self.vocabulary:
            z0 = pad(z0, (0, self._padded - self.vocabulary), value=em.FLOOR)
        truncation, descent, ratio = Truncation(*columns[:7]), em.Descent(*columns[7:11]), columns[11]
        rounds = max(_steps(rows[i].params) for i in full)
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

    def _sharpen(self, z: Tensor, kind: str, descent: em.Descent, ratio: Tensor, rounds: int) -> em.Sharpened:
        if kind == "sgd":
            return em.gradient_descent(z, descent, rounds, self._descend)
        if kind == "sgd+kl":
            return em.gradient_descent_with_kl(z, descent, rounds)
        if kind == "adam":
            return em.adam(z, descent, rounds)
        if kind == "adaptive":
            return em.adaptive_temperature(z, ratio, descent.threshold)
        H = em.entropy(z)
        return em.Sharpened(z, H, H, torch.zeros_like(H))


class Compiled:
    """`em.descend` through torch.compile; as it is where that fails, which is said once."""

    def __init__(self) -> None:
        self._step: em.Step = torch.compile(em.descend, dynamic=False)
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
            console.warn(f"torch.compile failed ({why}); the EM step runs uncompiled, which is slower")
            self._step = em.descend
            done = self._step(z, threshold, allowed, rate)
        self._proven = True
        return done


def em_kind(params: SamplingParams) -> str:
    """Which computation the row's EM step is."""
    step = params.em
    if step is None:
        return "none"
    if isinstance(step, AdaptiveTemperature):
        return "adaptive"
    if step.optimizer == "adam":
        return "adam"
    return "sgd+kl" if step.kl_weight else "sgd"


def _steps(params: SamplingParams) -> int:
    return 0 if params.em is None or isinstance(params.em, AdaptiveTemperature) else params.em.steps


def _largest(params: SamplingParams, vocabulary: int) -> int:
    """Of how many tokens the row needs the order; see `choose`."""
    if 0 < params.top_k <= TOP:
        return TOP
    return vocabulary + GROUP if params.top_p < 1 or 0 < params.top_k < vocabulary else 0


def _settings(rows: Sequence[Row]) -> NDArray[np.float64]:
    """float64 [12, B]: Truncation's fields, Descent's, and the ratio of adaptive temperature."""
    out = np.zeros((12, len(rows)))
    for i, row in enumerate(rows):
        p, step = row.params, row.params.em
        out[:7, i] = (row.u, p.temperature, p.dynatemp_range, p.dynatemp_exponent, p.top_k, p.top_p, p.min_p)
        if isinstance(step, AdaptiveTemperature):
            out[[7, 11], i] = step.threshold, step.ratio
        elif step is not None:
            out[7:11, i] = step.threshold, step.steps, step.learning_rate, step.kl_weight
    return out


def adjusted(block: Tensor, rows: Sequence[Row]) -> Tensor:
    """Penalties, then biases, on the first rows of a block, float32 [R, V], in place."""
    entries = [(i, token, times, row.params) for i, row in enumerate(rows) for token, times in _seen(row)]
    if entries:
        where = torch.tensor([(i, token) for i, token, _, _ in entries], device=block.device).T
        values = [
            (float(n), p.repeat_penalty, p.presence_penalty, p.frequency_penalty) for *_, n, p in entries
        ]
        times, repeat, presence, frequency = torch.tensor(values, device=block.device).T
        old = block[where[0], where[1]]
        new = torch.where(old > 0, old / repeat, old * repeat) - presence - frequency * times
        block[where[0], where[1]] = new
    biases = [(i, token, bias) for i, row in enumerate(rows) for token, bias in _biases(row, block.shape[1])]
    if biases:
        where = torch.tensor([(i, token) for i, token, _ in biases], device=block.device).T
        block[where[0], where[1]] += torch.tensor([bias for *_, bias in biases], device=block.device)
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


def _probability(z: Tensor, token: Tensor) -> Tensor:
    """softmax(z) at the token, [R, 1]."""
    shifted = z - z.amax(-1, keepdim=True)
    return shifted.gather(-1, token).exp() / shifted.exp().sum(-1, keepdim=True)


def _blocks(members: Sequence[int], size: int) -> Iterable[list[int]]:
    rest = iter(members)
    while block := list(islice(rest, size)):
        yield block


def _draw(values: NDArray[np.float64]) -> Draw:
    token, before, after, steps, p_before, p_after, without = values.tolist()
    if token < 0:
        raise LogitsError(_FAULTS[int(token)])
    return Draw(int(token), before, after, int(steps), p_before, p_after, int(without))
