import math

import numpy as np
import pytest

from emlocal.em.steps import EMInf
from emlocal.errors import LogitsError, UsageError
from emlocal.sampling import Sampler, SamplingParams
from emlocal.sampling.draw import adjust

ROW = np.float32([2.0, -1.0, 0.5, 0.0, -math.inf])


def adjusted(seen=(), **settings) -> list[float]:
    before = ROW.copy()
    row = adjust(ROW, SamplingParams(**settings), seen)
    np.testing.assert_array_equal(before, ROW)
    return row.tolist()


def test_nothing_applies() -> None:
    assert adjust(ROW, SamplingParams(), [0, 1]) is ROW
    assert adjust(ROW, SamplingParams(repeat_penalty=1.5), []) is ROW
    assert adjust(ROW, SamplingParams(repeat_penalty=1.5, repeat_last_n=0), [0]) is ROW


def test_repeat_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    seen = [0, 1, 1, 3, 4]
    assert adjusted(seen, repeat_penalty=2.0) == [1.0, -2.0, 0.5, 0.0, -math.inf]
    assert adjusted(seen, repeat_penalty=0.5) == [4.0, -0.5, 0.5, 0.0, -math.inf]


def test_presence_counts_once_and_frequency_each_time() -> None:
    seen = [0, 1, 1, 1]
    assert adjusted(seen, presence_penalty=0.5) == [1.5, -1.5, 0.5, 0.0, -math.inf]
    assert adjusted(seen, frequency_penalty=0.25) == [1.75, -1.75, 0.5, 0.0, -math.inf]
    assert adjusted(seen, presence_penalty=-0.5) == [2.5, -0.5, 0.5, 0.0, -math.inf]


def test_repeat_comes_before_presence_and_frequency_and_bias_last() -> None:
    row = adjusted(
        [0, 0], repeat_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.125, logit_bias=((0, 4.0),)
    )
    assert row[0] == 2.0 / 2 - 0.25 - 2 * 0.125 + 4.0


def test_the_window() -> None:
    seen = [0, 1, 2, 2]
    penalty = {"presence_penalty": 1.0}
    assert adjusted(seen, **penalty, repeat_last_n=2) == [2.0, -1.0, -0.5, 0.0, -math.inf]
    assert adjusted(seen, **penalty, repeat_last_n=3) == [2.0, -2.0, -0.5, 0.0, -math.inf]
    assert adjusted(seen, **penalty, repeat_last_n=99) == adjusted(seen, **penalty, repeat_last_n=-1)
    assert adjusted(seen, **penalty, repeat_last_n=-1) == [1.0, -2.0, -0.5, 0.0, -math.inf]
    many = [0] + [1] * 64
    assert adjusted(many, **penalty)[:2] == [2.0, -2.0]  # 64 by default


def test_logit_bias() -> None:
    assert adjusted(logit_bias=((1, 1.5), (3, -math.inf), (1, 1.0))) == [2.0, 1.5, 0.5, -math.inf, -math.inf]
    with pytest.raises(UsageError, match=r"token 5; the model's tokens are 0 to 4"):
        adjusted(logit_bias=((5, 1.0),))


def test_a_banned_token_is_never_drawn_and_banning_all_is_an_error() -> None:
    sampler = Sampler(5)
    params = SamplingParams(logit_bias=((0, -math.inf),), temperature=1.0, min_p=0.0)
    drawn = {sampler.sample(ROW, params, u).token for u in np.linspace(0, 1 - 2**-53, 101)}
    assert drawn == {1, 2, 3}
    with pytest.raises(LogitsError, match="masked"):
        sampler.sample(ROW, SamplingParams(logit_bias=tuple((t, -math.inf) for t in range(5))), 0.5)


def test_penalties_come_before_em_which_comes_before_temperature() -> None:
    """H is that of the penalised logits; EM steps happen at temperature 1, and the rest follows."""
    row = np.float32([3.0, 2.5, 0.0])
    params = SamplingParams(repeat_penalty=2.0, em=EMInf(0.01, 3, 1.0), temperature=2.0, min_p=0.0)
    draw = Sampler(3).sample(row, params, 0.5, seen=[0])
    penalized = np.array([1.5, 2.5, 0.0])
    p = np.exp(penalized) / np.exp(penalized).sum()
    assert draw.entropy_before == pytest.approx(-(p * np.log(p)).sum(), rel=1e-6)
    assert draw.p_before == pytest.approx(p[draw.token], rel=1e-6)
    z = penalized.copy()
    for _ in range(3):
        q = np.exp(z) / np.exp(z).sum()
        z += q * (np.log(q) - (q * np.log(q)).sum())
    q = np.exp(z) / np.exp(z).sum()
    assert draw.p_after == pytest.approx(q[draw.token], rel=1e-6)
    assert draw.entropy_after == pytest.approx(-(q * np.log(q)).sum(), rel=1e-5)
    hot = np.exp(z / 2)
    cumulative = np.cumsum(hot / hot.sum())
    assert draw.token == int((cumulative <= 0.5).sum())
