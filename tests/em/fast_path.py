"""The fast path and the reference, for the tests that compare them."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from emlocal.em import EMResult, EMStep
from emlocal.em.split import CUTOFFS, Sharpened, Split, Splitter
from emlocal.sampling.sampler import FAST_WAYS

Row = NDArray[np.float32]
CONTRACT = 1e-5
"""The total variation that the fast path promises."""


@dataclass
class Comparison:
    """The fast path for one row, setting and cutoff, and its distance from the reference."""

    fast: Sharpened
    reference: EMResult
    total_variation: float


def sharpen(split: Split, step: EMStep | None) -> Sharpened | None:
    """Returns the step's fast path, as the sampler finds it."""
    return split.untouched() if step is None else FAST_WAYS[type(step)].sharpen(split, step)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    p: NDArray[np.float64] = weights / weights.sum()
    return p


def probabilities(split: Split, after: Sharpened) -> NDArray[np.float64]:
    """Returns the fast path's distribution, token by token."""
    weights = split.tail[: len(split.row)].astype(np.float64) * split.scale
    weights = np.where(weights > 0, weights**after.tail_power, 0.0) * after.tail_factor
    weights[split.index] = np.exp(after.head)
    np.testing.assert_allclose(weights.sum(), after.partition, rtol=2e-5)
    p: NDArray[np.float64] = weights / weights.sum()
    return p


def compare(row: Row, step: EMStep, cutoff: float) -> Comparison | None:
    """Compares both; returns None if the fast path declines at this cutoff."""
    split = Splitter(len(row)).split(row, cutoff)
    after = sharpen(split, step)
    if after is None:
        return None
    exact = step.apply(row)
    distance = np.abs(probabilities(split, after) - softmax(exact.logits)).sum() / 2
    return Comparison(after, exact, float(distance))


def first_cutoff(row: Row, step: EMStep) -> tuple[float, Comparison | None]:
    """Returns the cutoff that decoding would use, tried in the sampler's order; 0 is the reference."""
    for cutoff in CUTOFFS:
        comparison = compare(row, step, cutoff)
        if comparison is not None:
            return cutoff, comparison
    return 0.0, None


SHAPES = ("flat", "groups", "cutoff", "zipf", "heavy", "sparse", "one-hot", "denormal")


@st.composite
def hard_rows(draw: st.DrawFn) -> Row:
    """Draws rows that no model makes: flat, tied, masked, spread out, or mostly tail near a cutoff."""
    V = draw(st.sampled_from([1, 2, 3, 7, 50, 129, 1000, 3000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from(SHAPES))
    noise = rng.normal(size=V) * draw(st.sampled_from([0, 1e-14, 1e-9, 1e-7, 1e-4, 0.1]))
    tops = rng.permutation(V)[: draw(st.integers(1, 6))]
    row = np.zeros(V)
    if shape == "groups":
        row[rng.random(V) < draw(st.floats(0, 1))] = -draw(st.floats(0, 20))
    elif shape == "cutoff":
        beside = draw(st.sampled_from([-3, -0.1, -1e-6, 0, 1e-6, 0.1]))
        row[:] = np.log(draw(st.sampled_from(CUTOFFS))) + beside
        row[tops] = 0
    elif shape == "zipf":
        row = -draw(st.floats(0.5, 6)) * np.log(1 + rng.permutation(V).astype(float))
    elif shape == "heavy":
        row = rng.standard_t(1.5, V) * draw(st.floats(0.1, 100))
    elif shape == "sparse":
        row = np.log(rng.dirichlet(np.full(V, draw(st.sampled_from([0.01, 0.1, 1.0])))) + 1e-300)
    elif shape == "one-hot":
        row[:] = -draw(st.sampled_from([50, 90, 200, 1e4, 1e30]))
        row[tops[0]] = 0
    elif shape == "denormal":
        row[:] = -rng.uniform(80, 104, V)
        row[tops] = 0
    row = row + noise
    if draw(st.booleans()):
        row[rng.random(V) < draw(st.sampled_from([0.02, 0.5, 0.99]))] = -np.inf
        row[tops[0]] = 0
    return (row + draw(st.sampled_from([0, 0, 25, -30, 100, 1e4, -1e4]))).astype(np.float32)
