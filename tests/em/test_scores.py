"""Scores of one answer, compared with plain definitions on answers of any length."""

import math
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.em.scores import RANKED, UNSURE, WINDOW, scores

tokens = st.lists(st.tuples(st.floats(0, 12), st.floats(1e-30, 1)), min_size=1, max_size=3 * WINDOW).map(
    lambda pairs: tuple(map(list, zip(*pairs, strict=True)))
)


@given(tokens)
def test_scores_are_what_they_say(answer):
    entropies, probabilities = answer
    found = scores(entropies, probabilities)
    windows = [fmean(entropies[i : i + WINDOW]) for i in range(max(1, len(entropies) - WINDOW + 1))]
    assert found.tokens == len(entropies)
    assert found.mean_entropy == pytest.approx(fmean(entropies))
    assert found.window_entropy == pytest.approx(max(windows), abs=1e-9)
    assert found.tail_entropy == pytest.approx(windows[-1])
    assert found.largest_entropy == max(entropies)
    assert found.unsure == sum(h > UNSURE for h in entropies) / len(entropies)
    assert found.log_probability == pytest.approx(math.log(math.prod(probabilities)), abs=1e-6) or (
        math.prod(probabilities) == 0
    )
    assert found.mean_log_probability == pytest.approx(found.log_probability / found.tokens)
    assert found.answer_entropy is None


def test_the_answer_proper():
    assert scores([0.5, 2.0, 1.0], [0.5, 0.5, 0.5], slice(1, 3)).answer_entropy == 1.5
    assert scores([0.5], [0.5], slice(1, 1)).answer_entropy is None


def test_the_surer_answer_ranks_above_by_every_score():
    sure, unsure = scores([0.1] * 40, [0.9] * 40), scores([1.5] * 40, [0.2] * 40)
    for name, rank in RANKED.items():
        assert rank(sure) > rank(unsure), name


def test_a_probability_that_is_rounded_to_nothing_has_a_logarithm():
    assert math.isfinite(scores([3.0], [0.0]).log_probability)


@pytest.mark.parametrize(("entropies", "probabilities"), [([], []), ([1.0], [])])
def test_no_tokens_no_scores(entropies, probabilities):
    with pytest.raises(ValueError, match="cannot be scored"):
        scores(entropies, probabilities)
