"""The sampler of engines whose logits lie in main memory: one row in, one token and its statistics out.

The usual row goes through `Fused`, compiled code (`_fused.c`), in one call, several times faster. It needs
GCC or clang when emlocal is installed. Without them `Fused.where_built` returns None and numpy does the same
work: same tokens, more time.

`Sampler` takes all other rows, and every row on machines where nothing could be compiled. It splits the row
into head and tail (emlocal.em.split). EM steps with a fast way act on the head. The later steps act on the
head too if it provably holds every token that can be drawn, otherwise on the full row. Rows are taken one at
a time, each while it is in the processor's cache. That is faster than sweeps over [B, V], and a row cannot
depend on its neighbours.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emlocal.em import EMStep, Outcome, fast
from emlocal.em.entropy import Float64, checked, entropy, log_softmax
from emlocal.em.split import BLOCK, CUTOFFS, Float32, Sharpened, Split, Splitter
from emlocal.em.steps import AdaptiveTemperature, EMInf
from emlocal.em.steps.power import Power
from emlocal.sampling.draw import (
    COLDEST,
    Draw,
    Mask,
    adjust,
    illegal,
    inverse_cdf,
    nucleus,
    probabilities,
)
from emlocal.settings import SamplingParams

try:
    from emlocal.sampling import _fused
except ImportError:
    BUILT = False
else:
    BUILT = True

_KINDS = {"sgd": 1, "adam": 2}
"""EM-INF's kinds in _fused.c, by optimizer."""


def _compiled(em: EMStep | None) -> tuple[int, float, int, float, float, float] | None:
    """Returns a step as `_fused.c` takes it: kind, δ, steps, η, κ and α. None if it has no such step."""
    if em is None:
        return 0, math.inf, 0, 1.0, 0.0, 1.0
    if type(em) is EMInf:
        return _KINDS[em.optimizer], em.threshold, em.steps, em.learning_rate, em.kl_weight, 1.0
    if type(em) is AdaptiveTemperature:
        return 3, em.threshold, 0, 1.0, 0.0, em.ratio
    if type(em) is Power:
        return 4, 0.0, 0, 1.0, 0.0, em.alpha
    return None


class Fused:
    """The compiled sampler for rows of one vocabulary. Not for use from two threads at once.

    It owns the memory that it works in.
    """

    def __init__(self, vocabulary: int) -> None:
        self._row_bytes = 4 * vocabulary
        self._scratch = bytearray(_fused.scratch_bytes(vocabulary))
        self._legal = bytearray()  # logits and ids of legal tokens, once there is a mask

    @classmethod
    def where_built(cls, vocabulary: int) -> "Fused | None":
        """Returns one for this vocabulary; None if emlocal was installed without a compiler."""
        return cls(vocabulary) if BUILT else None

    def draw(self, row: Float32, params: SamplingParams, u: float, legal: Mask | None = None) -> Draw | None:
        """Draws a token from `row`, float32 [V], after penalties; returns None for unusual rows and settings.

        Unusual are flat or extreme rows, ranks that reach into the tail, and rows near the end of EM-INF's
        descent.
        With a mask the legal tokens are gathered first, and all steps act on them alone.
        """
        step = _compiled(params.em)
        if step is None:
            return None
        if row.nbytes != self._row_bytes:  # not float32 [V]: numpy reports what is wrong
            return None
        settings = (
            *step,
            params.temperature,
            params.dynatemp_range,
            params.dynatemp_exponent,
            params.top_k,
            params.top_p,
            params.min_p,
            u,
        )
        if legal is None:
            drawn = _fused.draw(row, self._scratch, *settings)
        else:
            if not self._legal:
                self._legal = bytearray(2 * self._row_bytes)
            drawn = _fused.draw_legal(row, self._scratch, *settings, legal, self._legal)
        return None if drawn is None else Draw._make(drawn)


NEGLIGIBLE = 1e-7
"""A tail with less than this share of the probability is left out of the draw."""


class FastWay(NamedTuple):
    """The two functions of an EM step's fast way, on a split row."""

    sharpen: Callable[[Split, Any], Sharpened | None]
    """Returns the row after the step; None if agreement cannot be promised at this cutoff."""
    hottest: Callable[[Any], float]
    """Returns the highest temperature that may follow; above it, the parts left out of the tail matter."""


FAST_WAYS: dict[type[EMStep], FastWay] = {
    EMInf: FastWay(fast.sharpen_em_inf, fast.hottest_em_inf),
    AdaptiveTemperature: FastWay(fast.sharpen_adaptive_temperature, fast.hottest_adaptive_temperature),
    Power: FastWay(fast.raise_to_power, fast.hottest_adaptive_temperature),
}
"""Fast ways by the step's type. The reference takes a step that is not listed here."""


class Sampler:
    """A sampler of tokens from rows of one vocabulary. Not for use from two threads at once."""

    def __init__(self, vocabulary: int, *, fused: bool = True) -> None:
        """Makes the buffers.

        `fused`: use compiled code if it was built; the tokens are the same without, but slower.
        """
        self._splitter = Splitter(vocabulary)
        self._fused = Fused.where_built(vocabulary) if fused else None
        self.paths: Counter[float] = Counter()
        """How many rows passed at which cutoff; 0 is the full-vocabulary reference."""

    def sample(
        self,
        row: Float32,
        params: SamplingParams,
        u: float,
        seen: Sequence[int] = (),
        legal: Mask | None = None,
    ) -> Draw:
        """Draws one token from one row.

        Args:
            row: raw logits, float32 [V], not changed.
            u: uniform in [0, 1).
            seen: token ids so far, for the penalties.
            legal: the tokens that may be drawn: the others are masked before the EM step.
        Raises:
            LogitsError: the row is not a distribution.
            UsageError: a logit bias names a token that the model does not have.
        """
        row = adjust(row, params, seen)
        if self._fused is not None and (drawn := self._fused.draw(row, params, u, legal)) is not None:
            self.paths[CUTOFFS[0]] += 1
            return drawn
        if legal is not None:
            row = np.where(illegal(legal, len(row)), np.float32(-math.inf), row)
        step = params.em
        way = FAST_WAYS.get(type(step)) if step is not None else None
        for cutoff in CUTOFFS if way or step is None else ():
            split = self._splitter.split(row, cutoff)
            if len(split.index) < params.top_k and cutoff != CUTOFFS[-1]:
                continue  # a confident row, and top-k reaches below this head
            sharpened = way.sharpen(split, step) if way else split.untouched()
            if sharpened is not None:
                if way and sharpened.steps and way.hottest(step) < params.temperature + params.dynatemp_range:
                    break
                self.paths[cutoff] += 1
                return _draw(split, sharpened, params, u)
        self.paths[0] += 1
        return _draw_reference(row, params, u)


def _draw(split: Split, sharpened: Sharpened, params: SamplingParams, u: float) -> Draw:
    plain = split.untouched()
    token = _choose(split, sharpened, params, u)
    without = token if sharpened.steps == 0 else _choose(split, plain, params, u)
    p_before = _probability(split, plain, token)
    return Draw(
        token,
        sharpened.entropy_before,
        sharpened.entropy_after,
        sharpened.steps,
        p_before,
        p_before if sharpened.steps == 0 else _probability(split, sharpened, token),
        without,
    )


def _choose(split: Split, weights: Sharpened, params: SamplingParams, u: float) -> int:
    """Chooses a token by temperature, top-k, top-p, min-p and the draw."""
    temperature = params.temperature_at(weights.entropy_after, len(split.row))
    if temperature == 0:
        return int(split.index[weights.head.argmax()])
    beta = 1 / max(temperature, COLDEST)
    top = float(weights.head.max())
    head = np.exp((weights.head - top) * beta)  # the most probable token has weight 1
    power = weights.tail_power * beta
    factor = math.log(weights.tail_factor)
    scale = math.exp(min((factor - top) * beta, 700.0))
    heaviest = scale * split.cutoff**power  # no tail token weighs more
    # a shortcut for the usual settings
    if params.min_p > heaviest and params.top_p >= 1 and not params.top_k:
        keep = np.flatnonzero(head >= params.min_p)
        return int(split.index[keep[0] if len(keep) == 1 else keep[inverse_cdf(head[keep], u)]])
    tail = _tail_mass(split, power, scale)

    keep = np.arange(len(head))
    if 0 < params.top_k < len(split.row):
        keep = _largest(head, params.top_k)
        in_doubt = len(keep) < params.top_k or head[keep].min() <= heaviest
        if in_doubt and (tail is None or tail > NEGLIGIBLE):
            return _choose_on_full_row(split, weights, params, u)
        tail = 0.0
    if params.top_p < 1:
        total = float(head[keep].sum())
        if tail is None or total < params.top_p * (total + tail):
            return _choose_on_full_row(split, weights, params, u)
        order = keep[np.argsort(-head[keep], kind="stable")]
        keep = np.sort(order[: nucleus(head[order], total + tail, params.top_p)])
        tail = 0.0
    if params.min_p > 0:
        if params.min_p <= heaviest and tail != 0:
            return _choose_on_full_row(split, weights, params, u)
        keep = keep[head[keep] >= params.min_p]
        tail = 0.0
    if tail is None or tail > NEGLIGIBLE * float(head.sum()):
        return _draw_with_tail(split, head, power, scale, u)
    return int(split.index[keep[inverse_cdf(head[keep], u)]])


def _tail_mass(split: Split, power: float, scale: float) -> float | None:
    """Returns scale · Σ_tail w^power: exact, or 0 if it is negligible; None if only a sweep could tell."""
    if power == 1:
        return scale * split.tail_mass
    if power > 1 and scale * split.cutoff ** (power - 1) * split.tail_mass <= NEGLIGIBLE:
        return 0.0
    return None


def _largest(weights: Float64, k: int) -> NDArray[np.intp]:
    """Returns the positions of the k largest weights, ascending; among equals the lower positions."""
    if len(weights) <= k:
        return np.arange(len(weights))
    candidates = np.flatnonzero(weights >= np.partition(weights, -k)[-k])
    return np.sort(candidates[np.argsort(-weights[candidates], kind="stable")[:k]])


def _choose_on_full_row(split: Split, weights: Sharpened, params: SamplingParams, u: float) -> int:
    """Chooses a token from the full row, if tail tokens may survive truncation.

    Rare; sorts the vocabulary.
    """
    exponents = split.row.astype(np.float64) - split.offset
    logits = weights.tail_power * exponents + math.log(weights.tail_factor)
    logits[split.index] = weights.head
    return inverse_cdf(probabilities(logits, params), u)


def _draw_with_tail(split: Split, head: Float64, power: float, scale: float, u: float) -> int:
    """Draws by inverse CDF in token order over the whole row: by blocks, then within one block."""
    tail = split.tail
    blocks = split.blocks * scale
    if power != 1:
        # uses the exponents: at high temperatures, weights matter that float32 cannot hold
        exponents = split.row - np.float32(split.offset)
        exponents[split.index] = -math.inf
        tail = np.zeros(len(split.tail), dtype=np.float32)
        np.exp(exponents * np.float32(power), out=tail[: len(exponents)])
        blocks = tail.reshape(-1, BLOCK).sum(axis=1, dtype=np.float64) * scale
    else:
        scale *= split.scale
    blocks = blocks + np.bincount(split.index // BLOCK, weights=head, minlength=len(blocks))
    block = inverse_cdf(blocks, u)
    before = float(blocks[:block].sum())
    start = block * BLOCK
    first, last = np.searchsorted(split.index, (start, start + BLOCK))
    weights = tail[start : start + BLOCK].astype(np.float64) * scale
    weights[split.index[first:last] - start] = head[first:last]
    within = (u * float(blocks.sum()) - before) / float(weights.sum())
    return start + inverse_cdf(weights, min(max(within, 0.0), 1.0))


def _probability(split: Split, weights: Sharpened, token: int) -> float:
    """Returns the token's probability before temperature and truncation."""
    position = int(np.searchsorted(split.index, token))
    if position < len(split.index) and split.index[position] == token:
        return math.exp(weights.head[position]) / weights.partition
    own = float(split.tail[token]) * split.scale
    p: float = weights.tail_factor * own**weights.tail_power / weights.partition
    return p


def _draw_reference(row: Float32, params: SamplingParams, u: float) -> Draw:
    """Draws without approximations: the reference EM step, then the reference pipeline."""
    original = checked(row)
    if params.em is None:
        H = float(entropy(original))
        result = Outcome(original - original.max(), H, H, 0)
    else:
        result = params.em.reference(original)
    token = inverse_cdf(probabilities(result.logits, params), u)
    return Draw(
        token,
        result.entropy_before,
        result.entropy_after,
        result.steps,
        float(np.exp(log_softmax(original)[token])),
        float(np.exp(log_softmax(result.logits)[token])),
        inverse_cdf(probabilities(original, params), u),
    )
