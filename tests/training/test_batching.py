"""Micro-batches and the weights of their tokens."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emlocal.training.rollouts import Rollout, micro_batches, token_weights

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Test machines are busy."""


@patient
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_each_index_once_within_the_budget_longest_first(lengths: list[int], budget: int) -> None:
    batches = micro_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) * longest <= budget or len(batch) == 1
        assert lengths[batch[0]] == longest
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)
    assert micro_batches(lengths, budget) == batches


def test_by_hand() -> None:
    assert micro_batches([10, 30, 20, 5], 40) == [[1], [2, 0], [3]]
    assert micro_batches([10, 30, 20, 5], 120) == [[1, 2, 0, 3]]
    assert micro_batches([10, 30, 20, 5], 1) == [[1], [2], [0], [3]]
    assert micro_batches([], 10) == []


def test_weights() -> None:
    rollouts = [Rollout((1, 1), tuple(range(n)), True, "", 0.0) for n in (1, 4, 5)]
    assert token_weights(rollouts, "token") == pytest.approx([0.1] * 3)
    assert token_weights(rollouts, "sequence") == pytest.approx([1 / 3] * 3)


@patient
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_token_weights_make_a_mean(lengths: list[int]) -> None:
    rollouts = [Rollout((1,), (2,) * n, True, "", 0.0) for n in lengths]
    weights = token_weights(rollouts, "token")
    assert sum(w * n for w, n in zip(weights, lengths, strict=True)) == pytest.approx(1)
