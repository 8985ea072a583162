import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from emlocal.em.entropy import entropy, entropy_gradient, log_softmax
from emlocal.errors import LogitsError

INF = math.inf
rows = arrays(np.float64, st.integers(1, 40), elements=st.floats(-50, 50))


@pytest.mark.parametrize("V", [1, 2, 3, 1000, 151_936])
@pytest.mark.parametrize("level", [0.0, 1e30, -1e30, 7.25])
def test_uniform_rows_have_entropy_log_v(V: int, level: float) -> None:
    assert entropy(np.full(V, level)) == pytest.approx(math.log(V), rel=1e-12)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.999, 1e-9])
def test_two_tokens(p: float) -> None:
    expected = -p * math.log(p) - (1 - p) * math.log1p(-p)
    assert entropy([math.log(p), math.log1p(-p)]) == pytest.approx(expected, rel=1e-7)


def test_masked_tokens_do_not_count() -> None:
    assert entropy([0.0, -INF, 0.0, -INF, 0.0]) == pytest.approx(math.log(3), rel=1e-14)
    assert entropy([-INF, 3.0, -INF]) == 0.0
    assert log_softmax([-INF, 3.0]).tolist() == [-INF, 0.0]


def test_huge_logits() -> None:
    assert entropy([1e30, -1e30, 0.0]) == 0.0
    assert entropy([1e30, 1e30]) == pytest.approx(math.log(2))
    assert entropy(np.float32([3e38, -3e38])) == 0.0


def test_one_token_is_certain() -> None:
    assert entropy([5.0]) == 0.0
    assert entropy_gradient([5.0]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ([0.0, math.nan], "NaN"),
        ([math.nan, INF], "NaN"),
        ([0.0, INF, -INF], r"\+inf"),
        ([-INF, -INF], "every token of a row is masked"),
        ([], "at least one token"),
    ],
)
def test_rows_that_are_no_distribution(row: list[float], fault: str) -> None:
    for function in (entropy, entropy_gradient, log_softmax):
        with pytest.raises(LogitsError, match=fault):
            function(row)
        if row:
            with pytest.raises(LogitsError, match=fault):
                function([[0.0] * len(row), row])  # a good row beside it does not hide it


def test_a_scalar_is_no_row() -> None:
    with pytest.raises(LogitsError, match="at least one token"):
        entropy(1.0)


@given(rows)
def test_entropy_lies_between_0_and_log_v(z: np.ndarray) -> None:
    assert 0 <= entropy(z) <= math.log(len(z)) + 1e-12


@given(rows)
def test_the_gradient_is_that_of_finite_differences(z: np.ndarray) -> None:
    step = 1e-5
    numeric = [(entropy(z + step * e) - entropy(z - step * e)) / (2 * step) for e in np.eye(len(z))]
    np.testing.assert_allclose(entropy_gradient(z), numeric, atol=2e-9)


@given(rows)
def test_the_gradient_sums_to_zero(z: np.ndarray) -> None:
    assert abs(entropy_gradient(z).sum()) < 1e-14 * len(z)


def test_the_gradient_of_masked_tokens_is_zero() -> None:
    z = np.array([1.0, -INF, 0.0])
    gradient = entropy_gradient(z)
    assert gradient[1] == 0
    np.testing.assert_array_equal(gradient[[0, 2]], entropy_gradient([1.0, 0.0]))


@pytest.mark.parametrize("V", [1, 2, 3, 8, 9, 127, 128, 129, 1000])
@pytest.mark.parametrize("function", [entropy, log_softmax, entropy_gradient])
def test_a_row_does_not_depend_on_its_neighbours_in_any_bit(V: int, function) -> None:
    z = np.random.default_rng(V).normal(0, 5, (2, 9, V)).astype(np.float32)
    for batch in (z, np.asfortranarray(z), z[:, ::-1][:, ::-1]):
        together = function(batch)
        for i in np.ndindex(2, 9):
            np.testing.assert_array_equal(together[i], function(z[i].copy()))
