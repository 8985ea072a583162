"""From rows of logits on a device to tokens, with one transfer to the host at the end.

It does the work of emlocal.sampling.draw on blocks of rows instead of single rows, in float64. The host's
half is emlocal.backends.device_sampler.

Rows are float64 [R, V], with FLOOR for masked tokens; settings are columns, [R, 1]. First comes the EM step,
as in emlocal.em's references, without asking the host. The number of rounds is fixed before they begin; a row
that is done stays the same, bit for bit, while others continue. Then come temperature, top-k, top-p, min-p
and the inverse-CDF draw.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from emlocal.backends import device_sampler
from emlocal.backends.base import Row
from emlocal.backends.device_sampler import INFINITE, MASKED, NAN, DeviceSampler, Run, kernel_of, most_steps
from emlocal.em.steps.adaptive_temperature import COLDEST, TOLERANCE
from emlocal.em.steps.em_inf import BETA1, BETA2, EPSILON
from emlocal.sampling import SamplingParams
from emlocal.sampling.draw import COLDEST as COLDEST_DRAW

FLOOR = -1e30
"""A masked token's logit: its probability is 0, and no product with it is NaN, as with -inf."""


class Sharpened(NamedTuple):
    """Rows after an EM step."""

    z: Tensor
    """[R, V]."""
    entropy_before: Tensor
    """Nats, [R, 1]; the next fields, too."""
    entropy_after: Tensor
    steps: Tensor


class Descent(NamedTuple):
    """EM-INF's settings, [R, 1] each."""

    threshold: Tensor
    steps: Tensor
    learning_rate: Tensor
    kl_weight: Tensor


def distribution(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns p and log p, [R, V], and the entropy in nats, [R, 1]."""
    shifted = z - z.amax(-1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(-1, keepdim=True)
    p, log_p = weights / total, shifted - total.log()
    return p, log_p, (-(p * log_p).sum(-1, keepdim=True)).clamp_min(0.0)


def entropy(z: Tensor) -> Tensor:
    """Returns the entropy in nats, [R, 1]."""
    return distribution(z)[2]


def descend(z: Tensor, threshold: Tensor, allowed: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Takes one step of gradient descent on the entropy, ∂H/∂z = −p (log p + H).

    It moves rows with H > threshold that `allowed` allows. Returns the rows after the step, the entropy
    before it, and which rows it moved. A function of tensors alone, for torch.compile.
    """
    p, log_p, H = distribution(z)
    active = allowed & (threshold < H)
    return torch.where(active, z + rate * p * (log_p + H), z), H, active


Step = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def gradient_descent(z: Tensor, settings: Descent, rounds: int, step: Step = descend) -> Sharpened:
    """Takes EM-INF's steps without the KL term.

    `rounds`: the most steps of any row; `step`: `descend`, or its compiled form.
    """
    taken = torch.zeros_like(settings.steps)
    before: Tensor | None = None
    for i in range(rounds):
        z, H, active = step(z, settings.threshold, settings.steps > i, settings.learning_rate)
        before = H.clone() if before is None else before
        taken += active
        if _over(active):
            break
    return _sharpened(z, before, taken)


def gradient_descent_with_kl(z: Tensor, settings: Descent, rounds: int) -> Sharpened:
    """Takes EM-INF's steps with the KL term: the gradient is that of the entropy and κ (p − p⁰)."""
    taken = torch.zeros_like(settings.steps)
    before: Tensor | None = None
    p0: Tensor | None = None
    for i in range(rounds):
        p, log_p, H = distribution(z)
        before, p0 = (H, p) if before is None or p0 is None else (before, p0)
        active = (settings.steps > i) & (settings.threshold < H)
        gradient = -p * (log_p + H) + settings.kl_weight * (p - p0)
        z = torch.where(active, z - settings.learning_rate * gradient, z)
        taken += active
        if _over(active):
            break
    return _sharpened(z, before, taken)


def adam(z: Tensor, settings: Descent, rounds: int) -> Sharpened:
    """Takes EM-INF's steps with Adam from a new state. Source: Kingma & Ba 2015, algorithm 1."""
    taken = torch.zeros_like(settings.steps)
    before: Tensor | None = None
    p0: Tensor | None = None
    mean, square = torch.zeros_like(z), torch.zeros_like(z)
    for i in range(rounds):
        p, log_p, H = distribution(z)
        before, p0 = (H, p) if before is None or p0 is None else (before, p0)
        active = (settings.steps > i) & (settings.threshold < H)
        gradient = -p * (log_p + H) + settings.kl_weight * (p - p0)
        mean += (1 - BETA1) * (gradient - mean)
        square += (1 - BETA2) * (gradient * gradient - square)
        root = square.sqrt() / math.sqrt(1 - BETA2 ** (i + 1))
        size = settings.learning_rate / (1 - BETA1 ** (i + 1))
        z = torch.where(active, z - size * mean / (root + EPSILON), z)
        taken += active
        if _over(active):
            break
    return _sharpened(z, before, taken)


def adaptive_temperature(z: Tensor, ratio: Tensor, threshold: Tensor) -> Sharpened:
    """Cools rows to the entropy max(ratio · H₀, threshold), by bisection of log τ."""
    before = entropy(z)
    target = torch.maximum(ratio * before, threshold)
    low = torch.full_like(before, math.log(COLDEST))
    high = torch.zeros_like(before)
    for _ in range(math.ceil(math.log2(-math.log(COLDEST) / TOLERANCE))):
        middle = (low + high) / 2
        fits = entropy(z / middle.exp()) <= target
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    tau = torch.where(entropy(z / COLDEST) > target, COLDEST, low.exp())
    cooled = before > target
    return _sharpened(torch.where(cooled, z / tau, z), before, cooled.to(z.dtype))


def _sharpened(z: Tensor, before: Tensor | None, taken: Tensor) -> Sharpened:
    after = entropy(z)
    if before is None:  # no row may take a step
        return Sharpened(z, after, after, taken)
    return Sharpened(z, before, torch.where(taken > 0, after, before), taken)


def _over(active: Tensor) -> bool:
    """Returns whether no row moves any more; False on devices where asking would wait."""
    return active.device.type == "cpu" and not bool(active.any())


GROUP = 512
"""Tokens that the draw sums up first; V is a multiple of it here."""
TOP = 1024
"""Rows that keep no more tokens than this need no sort of the vocabulary."""


class Truncation(NamedTuple):
    """The draw, and the settings of the steps after the EM step, [R, 1] each."""

    u: Tensor
    temperature: Tensor
    dynatemp_range: Tensor
    dynatemp_exponent: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def choose(z: Tensor, entropy: Tensor, settings: Truncation, vocabulary: int, largest: int) -> Tensor:
    """Returns the tokens that `settings.u` draws, int64 [R, 1].

    Args:
        z: logits after the EM step.
        entropy: theirs, nats [R, 1].
        vocabulary: tokens that are not padding.
        largest: how many tokens must be put in order: 0 if no row has top-k or top-p, TOP if each row has a
            top-k up to that, else V.
    """
    temperature = temperature_at(entropy, settings, vocabulary)
    shifted = z - z.amax(-1, keepdim=True)
    greedy = temperature == 0
    weights = (shifted / temperature.clamp_min(COLDEST_DRAW)).exp()
    # greedy: the tokens at the top share all the weight, and u = 0 takes the first
    weights = torch.where(greedy, (shifted == 0).to(z.dtype), weights)
    if largest:
        weights = _keep_largest(weights, settings, min(largest, weights.shape[1]))
    weights = torch.where(weights >= settings.min_p, weights, 0.0)  # the largest weight is 1
    return inverse_cdf(weights, torch.where(greedy, 0.0, settings.u))


def temperature_at(entropy: Tensor, settings: Truncation, vocabulary: int) -> Tensor:
    """Returns SamplingParams.temperature_at for each row."""
    if vocabulary == 1:
        return settings.temperature
    low = (settings.temperature - settings.dynatemp_range).clamp_min(0.0)
    share = (entropy / math.log(vocabulary)).clamp_max(1.0) ** settings.dynatemp_exponent
    ranged = low + (settings.temperature + settings.dynatemp_range - low) * share
    return torch.where(settings.dynatemp_range == 0, settings.temperature, ranged)


def _keep_largest(weights: Tensor, settings: Truncation, m: int) -> Tensor:
    """Applies top-k, then top-p: dropped tokens get weight 0. Among equal weights the lower ids stay."""
    if m < weights.shape[1]:
        ordered = weights.topk(m, dim=-1).values
    else:
        ordered = weights.sort(dim=-1, descending=True).values
    k = torch.where(settings.top_k > 0, settings.top_k, m).clamp_max(m)
    ranks = torch.arange(m, device=weights.device)
    sums = torch.where(ranks < k, ordered, 0.0).cumsum(-1)
    nucleus = (sums < settings.top_p * sums[:, -1:]).sum(-1, keepdim=True) + 1
    n = torch.where(settings.top_p < 1, torch.minimum(nucleus, k), k).long()
    least = ordered.gather(-1, n - 1)
    above, equal = weights > least, weights == least
    room = n - above.sum(-1, keepdim=True)
    return torch.where(above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room)), weights, 0.0)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Returns the first index whose cumulative weight exceeds u · total, int64 [R, 1].

    The search goes by groups, then within one.
    """
    grouped = weights.view(len(weights), -1, GROUP)
    sums = grouped.sum(-1)
    cumulative = sums.cumsum(-1)
    target = u * cumulative[:, -1:]
    group = _first_above(cumulative, sums, target)
    before = torch.where(group > 0, cumulative.gather(-1, (group - 1).clamp_min(0)), 0.0)
    inside = grouped.gather(1, group[..., None].expand(-1, 1, GROUP))[:, 0]
    return group * GROUP + _first_above(inside.cumsum(-1), inside, target - before)


def _first_above(cumulative: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Returns the first index where `cumulative` > target.

    If rounding leaves none, returns the last index with any weight.
    """
    last = torch.where(weights > 0, torch.arange(weights.shape[-1], device=weights.device), 0)
    return torch.minimum((cumulative <= target).sum(-1, keepdim=True), last.amax(-1, keepdim=True))


CPU_ROWS, CUDA_ROWS = 2, 16
"""Rows of a block; 16 rows of 151,936 tokens take 19 MB in each array."""


class TorchSampler(DeviceSampler):
    """The sampler of the torch engine; see DeviceSampler."""

    def __init__(
        self, vocabulary: int, device: torch.device, warn: Callable[[str], None] = lambda message: None
    ) -> None:
        """Sets up the sampler. `warn` is called once if the EM step cannot be compiled."""
        self.vocabulary = vocabulary
        self.device = device
        self.block = CPU_ROWS if device.type == "cpu" else CUDA_ROWS
        self._padded = -(-vocabulary // GROUP) * GROUP
        self._descend: Step = descend if device.type == "cpu" else Compiled(warn)

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
        """Returns the fields of Draw, or a fault in place of the token: float32 [R, V] → float64 [R, 7]."""
        top = raw.amax(-1, keepdim=True)  # NaN wins every max
        fault = torch.where(
            top.isnan(), NAN, torch.where(top.isposinf(), INFINITE, torch.where(top.isneginf(), MASKED, 0))
        )
        z0 = torch.where(fault < 0, 0.0, raw).double()
        z0 = (z0 - z0.amax(-1, keepdim=True)).clamp_min(FLOOR)
        if self._padded > self.vocabulary:
            z0 = pad(z0, (0, self._padded - self.vocabulary), value=FLOOR)
        truncation, descent, ratio = Truncation(*columns[:7]), Descent(*columns[7:11]), columns[11]
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

    def _sharpen(self, z: Tensor, kind: str, descent: Descent, ratio: Tensor, rounds: int) -> Sharpened:
        if kind == "sgd":
            return gradient_descent(z, descent, rounds, self._descend)
        if kind == "sgd+kl":
            return gradient_descent_with_kl(z, descent, rounds)
        if kind == "adam":
            return adam(z, descent, rounds)
        if kind == "adaptive":
            return adaptive_temperature(z, ratio, descent.threshold)
        H = entropy(z)
        return Sharpened(z, H, H, torch.zeros_like(H))


class Compiled:
    """`descend` through torch.compile. If that fails, `warn` is called once and it runs uncompiled."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._step: Step = torch.compile(descend, dynamic=False)
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
            self._warn(f"torch.compile failed ({why}); the EM step runs uncompiled and slower")
            self._step = descend
            done = self._step(z, threshold, allowed, rate)
        self._proven = True
        return done


def _columns(rows: Sequence[Row]) -> NDArray[np.float64]:
    """Returns u and the columns of `device_sampler.columns`, float64 [12, B]."""
    return np.concatenate([np.array([[row.u for row in rows]]), device_sampler.columns(rows)])


def _largest(params: SamplingParams, vocabulary: int) -> int:
    """Returns how many tokens of the row must be put in order; see `choose`."""
    if 0 < params.top_k <= TOP:
        return TOP
    return vocabulary + GROUP if params.top_p < 1 or 0 < params.top_k < vocabulary else 0


def adjusted(block: Tensor, rows: Sequence[Row]) -> Tensor:
    """Applies penalties, then biases, then masks, to the first rows of a block, float32 [R, V], in place."""
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
    packed = device_sampler.legal_bits(rows, block.shape[1])
    if packed is not None:
        bits = torch.from_numpy(packed).to(block.device)[..., None]
        legal = (bits >> torch.arange(8, dtype=torch.uint8, device=block.device)) & 1
        block[: len(rows)].masked_fill_(legal.flatten(1)[:, : block.shape[1]] == 0, -math.inf)
    return block


def _probability(z: Tensor, token: Tensor) -> Tensor:
    """Returns softmax(z) at the token, [R, 1]."""
    shifted = z - z.amax(-1, keepdim=True)
    return shifted.gather(-1, token).exp() / shifted.exp().sum(-1, keepdim=True)
