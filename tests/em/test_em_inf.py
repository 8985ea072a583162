import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emlocal.em.entropy import entropy
from emlocal.em.steps import EMInf
from emlocal.errors import LogitsError, UsageError
from tests.em.fast_path import softmax

INF = math.inf
rows = arrays(np.float64, st.integers(2, 30), elements=st.floats(-15, 15))


def naive(z: list[float], threshold: float, steps: int, rate: float, kl_weight: float) -> tuple[list, int]:
    """Computes EM-INF by gradient descent in Python's floats, one token at a time."""

    def distribution() -> tuple[list[float], float]:
        top = max(z)
        total = sum(math.exp(x - top) for x in z)
        p = [math.exp(x - top) / total for x in z]
        return p, -sum(q * math.log(q) for q in p if q > 0)

    z = list(z)
    p0, _ = distribution()
    for step in range(steps):
        p, H = distribution()
        if threshold >= H:
            return z, step
        for i in range(len(z)):
            if p[i] > 0:
                gradient = -p[i] * (math.log(p[i]) + H) + kl_weight * (p[i] - p0[i])
                z[i] -= rate * gradient
    return z, steps


@given(
    rows,
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(0, 15),
    st.sampled_from([0.1, 1.0, 5.0]),
    st.sampled_from([0.0, 0.05, 0.5]),
)
def test_agrees_with_a_naive_loop(z, threshold, steps, rate, kl_weight) -> None:
    expected, taken = naive(z.tolist(), threshold, steps, rate, kl_weight)
    result = EMInf(threshold, steps, rate, "sgd", kl_weight).apply(z)
    if taken == result.steps:  # otherwise the entropy touched δ within rounding
        np.testing.assert_allclose(softmax(result.logits), softmax(np.array(expected)), atol=1e-7)
    else:
        assert min(abs(float(H) - threshold) for H in (result.entropy_after, entropy(expected))) < 1e-9
    assert result.entropy_before == entropy(z)
    assert result.entropy_after == pytest.approx(float(entropy(result.logits)), abs=1e-13)


@given(rows, st.integers(1, 15), st.floats(0.01, 20))
def test_gradient_descent_keeps_the_argmax(z, steps, rate) -> None:
    result = EMInf(0.0, steps, rate).apply(z)
    assert z[result.logits.argmax()] >= z.max() - 1e-12  # rounding may separate near ties
    assert softmax(result.logits).max() >= softmax(z).max() - 1e-12


@given(rows, st.floats(0.001, 0.2))
def test_small_steps_never_raise_the_entropy(z, rate) -> None:
    last = math.inf
    for steps in range(6):
        after = float(EMInf(0.0, steps, rate).apply(z).entropy_after)
        assert after <= last + 1e-12
        last = after


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
class TestStopping:
    row = np.array([2.0, 1.0, 0.0, -1.0])

    def test_no_step_once_the_entropy_is_at_the_threshold(self, optimizer) -> None:
        H = float(entropy(self.row))
        at = EMInf(H, 10, 0.1, optimizer).apply(self.row)
        assert at.steps == 0
        np.testing.assert_array_equal(softmax(at.logits), softmax(self.row))
        assert EMInf(math.nextafter(H, 0), 10, 0.1, optimizer).apply(self.row).steps == 1

    def test_it_stops_at_the_first_step_below(self, optimizer) -> None:
        settings = EMInf(0.8, 1000, 0.05, optimizer)
        result = settings.apply(self.row)
        assert 1 < result.steps < 1000
        assert result.entropy_after <= 0.8
        before = EMInf(0.8, int(result.steps) - 1, 0.05, optimizer).apply(self.row)
        assert before.entropy_after > 0.8

    def test_threshold_0_spends_every_step(self, optimizer) -> None:
        assert EMInf(0.0, 7, 0.1, optimizer).apply(self.row).steps == 7

    def test_threshold_above_log_v_never_starts(self, optimizer) -> None:
        for threshold in (math.log(4), 5.0):
            assert EMInf(threshold, 7, 0.1, optimizer).apply(np.zeros(4)).steps == 0

    def test_0_steps_change_nothing(self, optimizer) -> None:
        result = EMInf(0.0, 0, 0.1, optimizer).apply(self.row)
        assert result.steps == 0
        np.testing.assert_array_equal(result.logits, self.row - 2.0)

    def test_one_hot_and_single_rows_are_left_alone(self, optimizer) -> None:
        for row in ([0.0, -INF, -INF], [7.0], [1e30, 0.0]):
            result = EMInf(0.0, 5, 1.0, optimizer).apply(row)
            assert (result.steps, result.entropy_before, result.entropy_after) == (0, 0, 0)

    def test_flat_rows_have_no_gradient(self, optimizer) -> None:
        for V in (2, 4, 64):  # log V is exact enough here that rounding breaks no tie
            result = EMInf(0.0, 5, 1.0, optimizer).apply(np.zeros(V))
            assert result.steps == 5
            np.testing.assert_array_equal(result.logits, np.full(V, result.logits[0]))

    def test_masked_tokens_stay_masked_and_do_not_count(self, optimizer) -> None:
        masked = EMInf(0.1, 5, 0.3, optimizer, 0.05).apply([2.0, -INF, 1.0, 0.0, -INF])
        short = EMInf(0.1, 5, 0.3, optimizer, 0.05).apply([2.0, 1.0, 0.0])
        np.testing.assert_array_equal(masked.logits[[1, 4]], [-INF, -INF])
        np.testing.assert_allclose(masked.logits[[0, 2, 3]], short.logits, rtol=1e-13)
        assert masked.steps == short.steps

    @pytest.mark.parametrize("bad", [math.nan, INF])
    def test_bad_rows(self, optimizer, bad) -> None:
        with pytest.raises(LogitsError):
            EMInf(optimizer=optimizer).apply([[0.0, 1.0], [0.0, bad]])
        with pytest.raises(LogitsError, match="masked"):
            EMInf(optimizer=optimizer).apply([-INF, -INF])

    def test_rows_are_independent_to_the_last_bit(self, optimizer, smollm2_rows) -> None:
        settings = EMInf(0.3, 3, 0.5, optimizer, 0.05)
        alone = [settings.apply(row) for row in smollm2_rows]
        for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2, 2, 0]):
            together = settings.apply(smollm2_rows[order])
            for i, j in enumerate(order):
                np.testing.assert_array_equal(together.logits[i], alone[j].logits)
                assert together.entropy_after[i] == alone[j].entropy_after
                assert together.steps[i] == alone[j].steps

    def test_shapes(self, optimizer) -> None:
        z = np.random.default_rng(0).normal(size=(2, 3, 5))
        result = EMInf(optimizer=optimizer).apply(z)
        assert result.logits.shape == (2, 3, 5)
        assert result.entropy_before.shape == result.entropy_after.shape == result.steps.shape == (2, 3)

    def test_a_common_shift_changes_nothing(self, optimizer) -> None:
        here, there = (EMInf(0.1, 5, 0.5, optimizer).apply(self.row + shift) for shift in (0, 1024))
        np.testing.assert_array_equal(here.logits, there.logits)


def test_the_kl_term_holds_the_distribution_near_the_original() -> None:
    z = np.array([1.0, 0.6, 0.0, -2.0])
    p0 = softmax(z)

    def divergence(kl_weight: float) -> float:
        p = softmax(EMInf(0.0, 200, 0.2, "sgd", kl_weight).apply(z).logits)
        return float((p0 * np.log(p0 / p)).sum())

    divergences = [divergence(k) for k in (0.1, 1.0, 10.0)]
    assert divergences[0] > 3 * divergences[1] > 9 * divergences[2] > 0


def test_where_entropy_and_kl_balance_the_gradient_is_zero() -> None:
    z = np.array([1.0, 0.6, 0.0, -2.0])
    result = EMInf(0.0, 1000, 0.5, "sgd", 3.0).apply(z)
    p, p0 = softmax(result.logits), softmax(z)
    pull = 3.0 * (p - p0)
    push = -p * (np.log(p) + float(result.entropy_after))
    np.testing.assert_allclose(push, -pull, atol=1e-12)
    assert abs(pull).max() > 0.01


@pytest.mark.parametrize(
    ("bad", "flag", "span"),
    [
        ({"threshold": -0.1}, "--em-threshold", "at least 0"),
        ({"threshold": math.inf}, "--em-threshold", "at least 0"),
        ({"threshold": math.nan}, "--em-threshold", "at least 0"),
        ({"steps": -1}, "--em-steps", "between 0 and 1000"),
        ({"steps": 1001}, "--em-steps", "between 0 and 1000"),
        ({"steps": 2.5}, "--em-steps", "a whole number between 0 and 1000"),
        ({"learning_rate": 0.0}, "--em-learning-rate", "more than 0"),
        ({"learning_rate": 1e7}, "--em-learning-rate", "more than 0 and at most 1e+06"),
        ({"learning_rate": True}, "--em-learning-rate", "more than 0"),
        ({"kl_weight": -1.0}, "--em-kl-weight", "between 0 and 1e+06"),
        ({"optimizer": "adamw"}, "--em-optimizer", "sgd or adam"),
    ],
)
def test_bad_settings_are_named_with_their_range(bad, flag, span) -> None:
    with pytest.raises(UsageError) as caught:
        EMInf(**bad)
    assert flag in caught.value.message
    assert span in caught.value.message
    assert "is" in caught.value.message.split()
