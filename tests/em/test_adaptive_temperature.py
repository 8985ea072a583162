import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emlocal.em.entropy import entropy
from emlocal.em.steps import AdaptiveTemperature
from emlocal.em.steps.adaptive_temperature import COLDEST, TOLERANCE
from emlocal.errors import LogitsError, UsageError

INF = math.inf
rows = arrays(np.float64, st.integers(2, 30), elements=st.floats(-15, 15))


def temperature(z: np.ndarray, tempered: np.ndarray) -> float:
    """Returns τ, from the token farthest below the top."""
    finite = np.isfinite(z)
    low = np.where(finite, z, z.max()).argmin()
    return float((z[low] - z.max()) / tempered[low])


@given(rows, st.floats(0.05, 0.95), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_largest_temperature_that_reaches_the_target(z, ratio, threshold) -> None:
    settings = AdaptiveTemperature(ratio, threshold)
    result = settings.apply(z)
    H0 = float(entropy(z))
    target = max(ratio * H0, threshold)
    if target >= H0:
        assert result.steps == 0
        np.testing.assert_array_equal(result.logits, z - z.max())
        return
    assert result.steps == 1
    shifted = z - z.max()
    if entropy(shifted / COLDEST) > target:  # ties, or nearly
        np.testing.assert_array_equal(result.logits, shifted / COLDEST)
        return
    tau = temperature(z, result.logits)
    assert result.entropy_after <= target
    assert entropy(z / (tau * (1 + 2 * TOLERANCE))) > target  # any warmer is too warm
    np.testing.assert_allclose(result.logits, shifted / tau, rtol=1e-12)


@pytest.mark.parametrize("ties", [2, 5])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_ties_stay_ties_at_the_coldest_temperature(ties: int, ratio: float) -> None:
    z = np.array([3.0] * ties + [0.0, -INF, 2.9])
    result = AdaptiveTemperature(ratio, 0.0).apply(z)
    p = np.exp(result.logits)
    np.testing.assert_array_equal(p, [1.0] * ties + [0.0, 0.0, 0.0])
    assert result.entropy_after == pytest.approx(math.log(ties))
    assert result.logits[ties] == -3.0 / COLDEST


def test_low_entropies_are_left_alone() -> None:
    z = np.array([5.0, 0.0, 0.0])
    H0 = float(entropy(z))
    for settings in (
        AdaptiveTemperature(0.5, H0),
        AdaptiveTemperature(1.0, 0.0),
        AdaptiveTemperature(0.1, 9.0),
    ):
        result = settings.apply(z)
        assert result.steps == 0
        np.testing.assert_array_equal(result.logits, z - 5.0)
    assert AdaptiveTemperature(0, 0).apply([5.0, -INF]).steps == 0
    assert AdaptiveTemperature(0, 0).apply([5.0]).steps == 0


def test_ratio_0_and_threshold_0_ask_for_the_top_token() -> None:
    result = AdaptiveTemperature(0, 0).apply([1.0, 0.9, -3.0])
    assert np.exp(result.logits).tolist() == [1.0, 0.0, 0.0]
    assert result.entropy_after == 0


def test_among_distributions_of_that_entropy_the_tempered_one_is_nearest() -> None:
    """The claim of the module: KL(q ‖ p) is least at the tempered q. Tested against random q's."""
    z = np.array([1.0, 0.4, 0.0, -1.0])
    p = np.exp(z) / np.exp(z).sum()
    result = AdaptiveTemperature(0.6, 0.0).apply(z)
    q = np.exp(result.logits) / np.exp(result.logits).sum()
    least = float((q * np.log(q / p)).sum())
    rng = np.random.default_rng(0)
    others = 0
    for _ in range(500):
        other = AdaptiveTemperature(0.0, float(result.entropy_after)).apply(z + rng.normal(0, 0.5, 4))
        if other.steps and other.entropy_after <= result.entropy_after + 1e-6:
            r = np.exp(other.logits) / np.exp(other.logits).sum()
            assert (r * np.log(r / p)).sum() >= least - 1e-5
            others += 1
    assert others > 100


def test_rows_are_independent_to_the_last_bit(smollm2_rows) -> None:
    settings = AdaptiveTemperature(0.5, 0.1)
    alone = [settings.apply(row) for row in smollm2_rows[3:]]
    together = settings.apply(smollm2_rows[[5, 3, 4]])
    for i, j in enumerate([2, 0, 1]):
        np.testing.assert_array_equal(together.logits[i], alone[j].logits)
        assert together.entropy_after[i] == alone[j].entropy_after


def test_bad_rows() -> None:
    for row in ([math.nan, 0.0], [INF, 0.0], [-INF]):
        with pytest.raises(LogitsError):
            AdaptiveTemperature().apply(row)


@pytest.mark.parametrize(
    ("bad", "flag", "span"),
    [
        ({"ratio": -0.1}, "--em-ratio", "between 0 and 1"),
        ({"ratio": 1.1}, "--em-ratio", "between 0 and 1"),
        ({"ratio": math.nan}, "--em-ratio", "between 0 and 1"),
        ({"threshold": -1}, "--em-threshold", "at least 0"),
    ],
)
def test_bad_settings_are_named_with_their_range(bad, flag, span) -> None:
    with pytest.raises(UsageError, match=flag) as caught:
        AdaptiveTemperature(**bad)
    assert span in caught.value.message
