"""Equal values give equal texts, by which behaviours are compared."""

import math
from collections import Counter, OrderedDict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.sandbox.canonical import canonical, shortened
from tests.examples import examples

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.integers()
    | st.sampled_from([0.0, -0.0, 1.0, 2.0, 0.5, 1e300, 2.0**60, 123456789012.0])
    | st.text(max_size=3)
    | st.binary(max_size=2)
)
HASHABLE = st.recursive(ATOMS, lambda v: st.tuples(v, v) | st.frozensets(v, max_size=3), max_leaves=5)
VALUES = st.recursive(
    HASHABLE,
    lambda v: st.lists(v, max_size=3) | st.tuples(v) | st.dictionaries(HASHABLE, v, max_size=3),
    max_leaves=8,
)


@examples(400)
@given(VALUES, VALUES)
def test_texts_are_equal_where_values_are(a: Any, b: Any) -> None:
    assert (canonical(a) == canonical(b)) == (a == b)


@examples(200)
@given(st.lists(st.tuples(st.integers(0, 9), st.text(max_size=2)), max_size=6), st.randoms())
def test_the_order_of_sets_and_dictionaries_does_not_count(pairs: list[tuple[int, str]], random: Any) -> None:
    pairs = list(dict(pairs).items())
    shuffled = random.sample(pairs, len(pairs))
    assert canonical(dict(pairs)) == canonical(dict(shuffled))
    assert canonical(set(pairs)) == canonical(set(shuffled))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.1 + 0.2, 0.3),
        ([1 / 3], [0.3333333333333]),
        (1, True),
        (2.0, 2),
        (3 + 0j, 3),
        (np.float64(0.5), 0.5),
        (np.int64(7), 7),
        (np.array([1, 2.0]), np.array([1.0, 2])),
        (Counter("aab"), {"b": 1, "a": 2}),
        (OrderedDict(a=1), {"a": 1}),
        (namedtuple("P", "x y")(1, 2), (1, 2)),
        (deque([1, 2]), deque([1.0, 2.0])),
        (lambda: 1, lambda: 2),
        ((i for i in "a"), (i for i in "b")),
        (float("nan"), float("nan")),
    ],
)
def test_the_same(a: Any, b: Any) -> None:
    assert canonical(a) == canonical(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.333, 1 / 3),
        ([1, 2], (1, 2)),
        (1, "1"),
        (None, "None"),
        ({1}, [1]),
        (set(), {}),
        ([[1], 2], [1, [2]]),
        ("a, b", ["a", "b"]),
        (b"a", "a"),
        (range(3), [0, 1, 2]),
        (np.array([1, 2]), [1, 2]),
        (10**30, 10**30 + 1),
        (deque([1]), [1]),
        (int, 1),
        (math.inf, -math.inf),
    ],
)
def test_not_the_same(a: Any, b: Any) -> None:
    assert canonical(a) != canonical(b)


def test_a_number_too_long_for_decimals_has_a_text() -> None:
    assert canonical(10**5000) != canonical(10**5000 + 1)


def test_a_long_text_is_its_beginning_and_a_digest() -> None:
    a, b = "x" * 5000 + "a", "x" * 5000 + "b"
    assert len(shortened(a)) < 300
    assert shortened(a) != shortened(b)
    assert shortened("short") == "short"
    assert shortened("\ud800" * 500).startswith("\ud800")
