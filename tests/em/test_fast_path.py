"""The fast path agrees with the reference: total variation ≤ 1e-5 whenever it gives a result."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, event, example, given
from hypothesis import strategies as st

from emlocal.em.entropy import entropy
from emlocal.em.fast import _curvature
from emlocal.em.split import CUTOFFS, ROUNDING, Splitter
from emlocal.em.steps import AdaptiveTemperature, EMInf
from emlocal.errors import LogitsError
from emlocal.settings import EM_PRESETS
from tests.em.fast_path import CONTRACT, compare, first_cutoff, hard_rows, probabilities, sharpen, softmax
from tests.examples import examples

INF = math.inf

GRADIENT_DESCENT = [
    *(EMInf(d, k, lr) for d, k, lr in itertools.product((0.0, 0.3, 1.0), (1, 5, 15), (0.1, 2.0, 10.0))),
    *(EMInf(0.3, 10, lr, "sgd", kl) for lr, kl in itertools.product((0.1, 1.0, 3.0), (0.05, 0.5))),
]
ADAM = [
    *(EMInf(d, k, lr, "adam") for d, k, lr in itertools.product((0.0, 0.3), (1, 3, 10), (0.01, 0.1, 0.3))),
    *(EMInf(0.3, 3, lr, "adam", kl) for lr, kl in itertools.product((0.01, 0.3), (0.05, 0.5))),
]
ADAPTIVE = [
    AdaptiveTemperature(ratio, threshold)
    for ratio, threshold in itertools.product((0.05, 0.2, 0.5, 0.85, 0.95), (0.0, 1e-5, 0.1))
]
GRIDS = {"gradient-descent": GRADIENT_DESCENT, "adam": ADAM, "adaptive-temperature": ADAPTIVE}


@pytest.mark.parametrize("grid", GRIDS)
def test_total_variation_on_recorded_rows(smollm2_rows, grid: str) -> None:
    used: Counter[float] = Counter()
    for step, row in itertools.product(GRIDS[grid], smollm2_rows):
        cutoff, found = first_cutoff(row, step)
        used[cutoff] += 1
        if found is None:
            continue
        assert found.total_variation <= CONTRACT, (step, cutoff)
        assert found.fast.steps == found.reference.steps, (step, cutoff)
        assert found.fast.entropy_before == pytest.approx(float(found.reference.entropy_before), abs=1e-5)
        assert found.fast.entropy_after == pytest.approx(float(found.reference.entropy_after), abs=2e-4)
    share = {cutoff: n / used.total() for cutoff, n in used.items()}
    if grid == "gradient-descent":
        assert share[CUTOFFS[0]] > 0.9
        assert 0.0 not in share
    else:  # Adam's bound does not reach as far, especially over many steps
        assert share.get(0.0, 0) < (0.4 if grid == "adam" else 0.01)


@pytest.mark.parametrize("preset", EM_PRESETS)
def test_total_variation_of_the_presets_on_both_models(recorded, preset: str) -> None:
    step, _ = EM_PRESETS[preset]
    for row in recorded:
        cutoff, found = first_cutoff(row, step)
        assert found is not None
        assert found.total_variation <= CONTRACT
        assert found.fast.steps == found.reference.steps
        if preset != "em-pt":
            assert cutoff == CUTOFFS[0]


def test_decoding_settings_for_both_models_pass_at_every_cutoff(recorded) -> None:
    for cutoff, row in itertools.product(CUTOFFS, recorded):
        found = compare(row, EMInf(), cutoff)
        assert found is not None
        assert found.total_variation <= CONTRACT


@st.composite
def em_steps(draw: st.DrawFn) -> EMInf | AdaptiveTemperature:
    threshold = draw(st.sampled_from([0.0, 1e-9, 0.01, 0.3, math.log(2), 1.0, 7.0]))
    kind = draw(st.sampled_from(["sgd", "adam", "adaptive"]))
    if kind == "adaptive":
        return AdaptiveTemperature(draw(st.floats(0, 1)), threshold)
    # far beyond sensible values, up to the limit
    rates = [0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e4, 1e6]
    kl_weight = draw(st.sampled_from([0, 0, 0.05, 0.5, 3.0, 15.0, 600.0, 1e6]))
    return EMInf(threshold, draw(st.integers(0, 30)), draw(st.sampled_from(rates)), kind, kl_weight)


def near_flat(V: int) -> np.ndarray:
    return (np.random.default_rng(V).normal(size=V) * 1e-14).astype(np.float32)


@example(near_flat(3000), EMInf(0.0, 7, 0.28, "adam", 0.05), 1e-6)
@example(near_flat(10), EMInf(0.3, 10, 0.2, "adam"), 1e-6)
@example(near_flat(300) * np.float32(1e8), EMInf(1.0, 40, 6.9, "sgd", 585.0), 1e-9)
@example(np.zeros(10, np.float32), EMInf(0.0, 1000, 1e6), 1e-6)
@example(np.float32([0, 0, -13.9]), EMInf(0.0, 1, 2e5), 1e-6)
@example(np.float32([3e38, -3e38, 0]), EMInf(), 1e-6)
@example(np.random.default_rng(0).normal(0, 3, 300).astype(np.float32), EMInf(0.0, 5, 1e6, "adam"), 1e-6)
@example(np.random.default_rng(0).normal(0, 3, 300).astype(np.float32), EMInf(0.0, 5, 1e6), 1e-6)
@examples(400, suppress_health_check=[HealthCheck.too_slow])
@given(hard_rows(), em_steps(), st.sampled_from(CUTOFFS))
def test_hard_rows(row, step, cutoff) -> None:
    found = compare(row, step, cutoff)
    event("declined" if found is None else "answered")
    if found is None:
        return
    assert found.total_variation <= CONTRACT
    # below 1e-9 nats, rounding decides whether H > δ
    if found.reference.entropy_before > 1e-9 and found.total_variation > 1e-12:
        assert found.fast.steps == found.reference.steps


@pytest.mark.parametrize("rows", [300])
def test_random_search_for_a_row_that_breaks_the_contract(rows: int) -> None:
    """Searches rows at the edge.

    They have much mass in the tail, just below the cutoff, and the longest accepted steps.
    """
    rng = np.random.default_rng(1)
    answered = 0
    for _ in range(rows):
        V, cutoff = int(rng.choice([300, 3000, 30_000])), float(rng.choice(CUTOFFS))
        row = np.log(cutoff) - rng.exponential(rng.choice([1e-3, 0.3, 3]), V)
        tops = int(rng.integers(1, 8))
        row[:tops] = -rng.exponential(rng.choice([1e-6, 0.1, 2]), tops)
        rate = float(np.exp(rng.uniform(-4, 5)))
        kl_weight = float(rng.choice([0, 0.05, 0.5, 14, 200]))
        optimizer = str(rng.choice(["sgd", "adam"]))
        step: EMInf | AdaptiveTemperature = EMInf(0.0, int(rng.integers(1, 16)), rate, optimizer, kl_weight)
        if rng.random() < 0.3:
            step = AdaptiveTemperature(float(rng.uniform(0, 1)), 0.0)
        found = compare(row.astype(np.float32), step, cutoff)
        if found is not None:
            answered += 1
            assert found.total_variation <= CONTRACT, (step, V, cutoff)
    assert answered > 10


class TestDefinedAnswers:
    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    def test_nothing_is_done_below_the_threshold(self, smollm2_rows, optimizer) -> None:
        for row in smollm2_rows:
            split = Splitter(len(row)).split(row)
            after = sharpen(split, EMInf(math.log(len(row)), 10, 1.0, optimizer))
            assert after == split.untouched()
            assert after.steps == 0

    def test_none_means_untouched(self, smollm2_rows) -> None:
        split = Splitter(smollm2_rows.shape[1]).split(smollm2_rows[5])
        after = sharpen(split, None)
        np.testing.assert_allclose(
            probabilities(split, after), softmax(smollm2_rows[5].astype(float)), atol=1e-7
        )

    @pytest.mark.parametrize("step", [EMInf(0.0), EMInf(0.0, optimizer="adam"), AdaptiveTemperature(0, 0)])
    def test_one_hot_rows(self, step) -> None:
        for row in ([3.0], [0.0, -INF], [-INF, 9e4, -INF], [0.0, -5e3]):
            after = sharpen(Splitter(len(row)).split(np.float32(row)), step)
            assert (after.steps, after.entropy_before, after.entropy_after) == (0, 0, 0)

    @pytest.mark.parametrize("bad", [math.nan, INF, -INF])
    def test_rows_that_are_no_distribution(self, bad) -> None:
        for row in ([bad] * 5, [bad, -INF, -INF]):
            with pytest.raises(LogitsError):
                Splitter(len(row)).split(np.float32(row))

    def test_h_just_at_the_threshold_is_left_to_the_reference(self, smollm2_rows) -> None:
        """Stopping there depends on the last bits, which only the reference has."""
        row = smollm2_rows[4]
        for H in (float(entropy(row)), float(EMInf(0.0, 3, 1.0).apply(row).entropy_after)):
            assert sharpen(Splitter(len(row)).split(row), EMInf(H, 10, 1.0)) is None


class TestSplit:
    @examples(150)
    @given(hard_rows(), st.sampled_from(CUTOFFS))
    def test_head_and_tail_are_the_row(self, row, cutoff) -> None:
        split = Splitter(len(row)).split(row, cutoff)
        s = row.astype(np.float64) - float(row.max())
        w = np.exp(s)
        head = np.zeros(len(row), bool)
        head[split.index] = True
        assert (w[head] >= cutoff * (1 - 1e-6)).all()
        assert (w[~head] <= cutoff * (1 + 1e-6)).all()
        np.testing.assert_array_equal(split.head, s[head])
        tail = np.where(np.isfinite(s) & ~head, s, 0.0)
        np.testing.assert_allclose(split.tail_mass, w[~head].sum(), rtol=ROUNDING, atol=1e-13)
        np.testing.assert_allclose(split.tail_moment, (w * tail)[~head].sum(), rtol=ROUNDING, atol=1e-13)
        np.testing.assert_allclose(split.blocks.sum(), split.tail_mass, rtol=1e-12)
        Q = split.squared_tail()
        exact = [(w**2 * tail**k)[~head].sum() for k in range(3)]
        np.testing.assert_allclose(Q, exact, rtol=1e-4, atol=1e-28)
        assert split.entropy == pytest.approx(float(entropy(row)), abs=1e-5)
        assert split.partition == pytest.approx(w.sum(), rel=1e-6)
        assert split.light_tail_mass(1e-8) == pytest.approx(
            (w * 1e-8 / (w + 1e-8))[~head].sum(), rel=1e-4, abs=1e-13
        )

    def test_a_tail_of_equal_tokens_is_summed_within_rounding(self) -> None:
        """If every token's float32 rounding is the same, the errors add up."""
        rng = np.random.default_rng(0)
        for _ in range(100):
            row = np.full(20_000, -rng.uniform(13.82, 20))
            row[0] = 0
            row = (row + rng.choice([rng.uniform(-14, 39), -20, 500])).astype(np.float32)
            split = Splitter(len(row)).split(row)
            s = row.astype(np.float64) - float(row.max())
            assert split.tail_mass == pytest.approx(np.exp(s[1:]).sum(), rel=ROUNDING)
            assert split.tail_moment == pytest.approx((np.exp(s) * s)[1:].sum(), rel=ROUNDING)

    def test_buffers_are_clean_for_the_next_row(self, smollm2_rows) -> None:
        shared = Splitter(smollm2_rows.shape[1])
        masked = smollm2_rows[1].copy()
        masked[::3] = -INF
        for row in (
            smollm2_rows[0],
            masked,
            smollm2_rows[5],
            smollm2_rows[2] + np.float32(1e3),
            smollm2_rows[3],
        ):
            here, fresh = shared.split(row), Splitter(len(row)).split(row)
            np.testing.assert_array_equal(here.tail, fresh.tail)
            assert (here.tail_mass, here.tail_moment, here.entropy) == (
                fresh.tail_mass,
                fresh.tail_moment,
                fresh.entropy,
            )
            assert here.squared_tail() == fresh.squared_tail()


@given(st.integers(2, 12), st.integers(0, 2**32), st.floats(0.1, 8))
def test_the_curvature_bounds_hold(V: int, seed: int, spread: float) -> None:
    """Compares λ and μ of `gradient_descent` with the eigenvalues of the Hessian, from finite differences."""
    z = np.random.default_rng(seed).normal(0, spread, V)
    p = softmax(z)
    H = float(entropy(z))
    a = np.log(p) + H
    x, y = p * (a + 0.5), p
    J = np.diag(p * (a + 1)) - np.outer(x, y) - np.outer(y, x)
    step = 1e-5
    ascent = [
        (p_plus * (np.log(p_plus) + entropy(z + e)) - p_minus * (np.log(p_minus) + entropy(z - e)))
        / (2 * step)
        for e in step * np.eye(V)
        for p_plus, p_minus in [(softmax(z + e), softmax(z - e))]
    ]
    np.testing.assert_allclose(J, ascent, atol=1e-7)  # the docstring's J is the derivative of p·a
    eigenvalues = np.linalg.eigvalsh(J)
    gram = np.array([p, p * a]) @ np.array([p, p * a]).T
    high, low = _curvature(float(p.max()), H, gram.tolist(), 1.0)
    assert high >= eigenvalues[-1] - 1e-12
    assert low <= eigenvalues[0] + 1e-12
