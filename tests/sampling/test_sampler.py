"""The sampler compared with a full-vocabulary pipeline, and that with numbers worked by hand."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.em.steps import AdaptiveTemperature, EMInf
from emlocal.em.steps.power import Power
from emlocal.errors import LogitsError
from emlocal.sampling import Sampler, SamplingParams, _fused
from emlocal.sampling.draw import probabilities
from emlocal.settings import EM_PRESETS
from tests.em.fast_path import hard_rows, softmax
from tests.examples import examples

LAST = 1 - 2.0**-53
BORDER = 1e-5
"""Distance from a border of the exact CDF within which the fast path may give the other token."""


class TestReference:
    """The plain pipeline on p = (.4, .3, .2, .1) in a shuffled order."""

    p = np.array([0.1, 0.4, 0.2, 0.3])

    def after(self, **settings) -> list[float]:
        settings = {"temperature": 1.0, "min_p": 0.0, **settings}
        return probabilities(np.log(self.p), SamplingParams(**settings)).round(12).tolist()

    def test_nothing_set(self) -> None:
        assert self.after() == [0.1, 0.4, 0.2, 0.3]

    def test_greedy(self) -> None:
        assert self.after(temperature=0) == [0, 1, 0, 0]
        assert probabilities(np.zeros(3), SamplingParams(temperature=0)).tolist() == [1, 0, 0]

    def test_temperature(self) -> None:
        np.testing.assert_allclose(self.after(temperature=0.5), self.p**2 / 0.3)
        np.testing.assert_allclose(self.after(temperature=2), np.sqrt(self.p) / np.sqrt(self.p).sum())

    def test_top_k(self) -> None:
        np.testing.assert_allclose(self.after(top_k=2), [0, 4 / 7, 0, 3 / 7])
        assert self.after(top_k=1) == [0, 1, 0, 0]
        assert self.after(top_k=4) == self.after(top_k=99) == [0.1, 0.4, 0.2, 0.3]

    def test_top_p_keeps_the_token_that_crosses(self) -> None:
        assert self.after(top_p=0.4 - 1e-9) == [0, 1, 0, 0]
        np.testing.assert_allclose(self.after(top_p=0.4 + 1e-9), [0, 4 / 7, 0, 3 / 7])
        np.testing.assert_allclose(self.after(top_p=0.7 + 1e-9), [0, 4 / 9, 2 / 9, 3 / 9])
        assert self.after(top_p=1e-9) == [0, 1, 0, 0]

    def test_min_p_is_relative_to_the_top(self) -> None:
        np.testing.assert_allclose(self.after(min_p=0.5 - 1e-9), [0, 4 / 9, 2 / 9, 3 / 9])
        np.testing.assert_allclose(self.after(min_p=0.5 + 1e-9), [0, 4 / 7, 0, 3 / 7])
        assert self.after(min_p=1) == [0, 1, 0, 0]

    def test_top_p_counts_what_top_k_left(self) -> None:
        """Of (4/7, 3/7), the first alone reaches 0.57; of the whole row, top-p would have kept two."""
        assert self.after(top_k=2, top_p=0.57) == [0, 1, 0, 0]
        assert self.after(top_p=0.57)[3] > 0

    def test_dynamic_temperature_is_that_of_the_entropy(self) -> None:
        """H = 1.2799, and log 4 = 1.3863: a share of 0.9233 of the way from 0.5 to 1.5."""
        params = SamplingParams(temperature=1.0, dynatemp_range=0.5, min_p=0.0)
        T = params.temperature_at(1.279854, 4)
        assert pytest.approx(0.5 + 0.92322, abs=1e-4) == T
        np.testing.assert_allclose(
            self.after(dynatemp_range=0.5), self.p ** (1 / T) / (self.p ** (1 / T)).sum(), rtol=1e-5
        )
        assert SamplingParams(temperature=0.5, dynatemp_range=0.7).temperature_at(0.0, 4) == 0

    def test_temperature_comes_before_truncation(self) -> None:
        """At T = 0.5 the weights are 16:9:4:1, and min-p 0.3 drops tokens that it would keep at T = 1."""
        np.testing.assert_allclose(self.after(temperature=0.5, min_p=0.3), [0, 16 / 25, 0, 9 / 25])
        np.testing.assert_allclose(self.after(min_p=0.3), [0, 4 / 9, 2 / 9, 3 / 9])
        assert self.after(temperature=0.5, top_p=0.53) == [0, 1, 0, 0]

    def test_ties_go_to_the_lower_token(self) -> None:
        params = SamplingParams(temperature=1.0, top_k=2, min_p=0.0)
        assert probabilities(np.array([0.0, 1.0, 1.0, 1.0]), params).tolist() == [0, 0.5, 0.5, 0]

    def test_masked_tokens_have_no_share(self) -> None:
        p = probabilities(np.array([-math.inf, 0.0, 0.0]), SamplingParams(temperature=100, min_p=0))
        assert p.tolist() == [0, 0.5, 0.5]

    @pytest.mark.parametrize("temperature", [1e-9, 1e-12, 1e-300, 5e-324])
    def test_no_temperature_overflows(self, temperature) -> None:
        p = probabilities(
            np.array([0.0, 1.0, 1.0, -math.inf, -3e38]), SamplingParams(temperature=temperature)
        )
        assert p.tolist() == [0, 0.5, 0.5, 0, 0]


EMS = {
    "none": None,
    "sgd": EMInf(),
    "sgd+kl": EMInf(0.2, 5, 0.5, "sgd", 0.1),
    "em-pt": EM_PRESETS["em-pt"][0],
    "adam": EMInf(0.05, 5, 0.5, "adam"),
    "adaptive": AdaptiveTemperature(0.5, 0.1),
}
"""The steps that devices have kernels for."""
HOST_EMS = {**EMS, "power": Power(4.0)}
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.0, min_p=0.0),
    SamplingParams(temperature=0.1, min_p=0.0),
    SamplingParams(temperature=1.5, min_p=0.0),
    SamplingParams(temperature=30.0, min_p=0.0),
    SamplingParams(temperature=1.0, min_p=1e-7),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=1.0, top_k=1, min_p=0.0),
    SamplingParams(temperature=1.0, top_k=40, top_p=0.95, min_p=0.0),
    SamplingParams(temperature=2.0, top_k=3000, min_p=0.0),
    SamplingParams(temperature=0.7, top_p=0.9, min_p=0.0),
    SamplingParams(temperature=1.3, top_p=0.999999, min_p=1e-4),
    SamplingParams(temperature=1.0, top_k=10**9, top_p=0.5, min_p=0.02),
    SamplingParams(temperature=0.8, dynatemp_range=0.7, dynatemp_exponent=0.5, min_p=0.0),
    SamplingParams(temperature=0.5, dynatemp_range=2.0, top_p=0.9, min_p=0.0),
]
WAYS = ["16", "32", "64", "numpy"]
"""The compiled sampler with vector registers of 16, 32 and 64 bytes, and the numpy one."""
US = [0.0, 2.0**-53, 1e-6, 0.1, 0.5, 0.77, 0.999, LAST]


@pytest.fixture(params=WAYS)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Sampler]]:
    """Makes samplers of one of the WAYS. A processor with narrower registers uses those."""
    if request.param == "numpy":
        yield lambda vocabulary: Sampler(vocabulary, fused=False)
        return
    _fused.limit_width(int(request.param))
    yield Sampler
    _fused.limit_width(64)


def agrees(token: int, p: np.ndarray, u: float) -> bool:
    """Whether u is in the token's share of the exact CDF, or within BORDER of it."""
    below = float(p[:token].sum())
    return below - BORDER <= u <= below + float(p[token]) + BORDER


@pytest.mark.parametrize("em", HOST_EMS)
@pytest.mark.parametrize("params", PARAMS, ids=lambda p: f"T{p.temperature}k{p.top_k}p{p.top_p}m{p.min_p}")
def test_draws_are_those_of_the_full_vocabulary(make, smollm2_rows, em, params) -> None:
    sampler = make(smollm2_rows.shape[1])
    with_em = SamplingParams(**{**vars(params), "em": HOST_EMS[em]})
    for row in smollm2_rows[[0, 2, 4]]:
        exact = (with_em.em or EMInf(steps=0)).apply(row)
        p, p_without = probabilities(exact.logits, params), probabilities(row.astype(float), params)
        q, q_without = softmax(exact.logits), softmax(row.astype(float))
        for u in US:
            draw = sampler.sample(row, with_em, u)
            assert agrees(draw.token, p, u)
            assert agrees(draw.token_without_em, p_without, u)
            assert draw.p_after == pytest.approx(q[draw.token], abs=2e-5)
            assert draw.p_before == pytest.approx(q_without[draw.token], rel=1e-5)
            assert draw.entropy_before == pytest.approx(float(exact.entropy_before), abs=1e-5)
            assert draw.entropy_after == pytest.approx(float(exact.entropy_after), abs=2e-4)
            assert draw.steps == exact.steps
            if draw.steps == 0:
                assert draw.token == draw.token_without_em
                assert draw.p_before == draw.p_after


def test_token_without_em_is_what_the_same_u_draws_without(make, smollm2_rows) -> None:
    sampler = make(smollm2_rows.shape[1])
    changed = 0
    for row, u in itertools.product(smollm2_rows, US):
        params = SamplingParams(em=EMInf(0.1, 15, 2.0), temperature=1.0, min_p=0.0)
        draw = sampler.sample(row, params, u)
        alone = sampler.sample(row, params.without_em(), u)
        assert draw.token_without_em == alone.token == alone.token_without_em
        assert alone.steps == 0
        assert alone.p_after == alone.p_before
        changed += draw.token != alone.token
    assert changed > 3


def test_draws_spread_over_the_tail_as_they_should(make, smollm2_rows) -> None:
    """Most of the probability is in the tail: T = 3 on the open row, by quantiles of u."""
    row, params = smollm2_rows[5], SamplingParams(temperature=3.0, min_p=0.0)
    sampler = make(len(row))
    cdf = np.cumsum(probabilities(row.astype(float), params))
    for u in np.linspace(0, 1, 150, endpoint=False):
        token = sampler.sample(row, params, float(u)).token
        assert cdf[token] >= u - BORDER
        assert token == 0 or cdf[token - 1] <= u + BORDER


@st.composite
def any_params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        em=draw(st.sampled_from(list(EMS.values()))),
        temperature=draw(st.sampled_from([0, 5e-324, 1e-12, 0.01, 0.3, 0.99, 1, 1.01, 2, 10, 100])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 100, 2999])),
        top_p=draw(st.sampled_from([1, 1, 1e-6, 0.5, 0.9, 0.999])),
        min_p=draw(st.sampled_from([0, 0, 1e-9, 1e-5, 0.05, 1])),
    )


@examples(300)
@given(hard_rows(), any_params(), st.one_of(st.sampled_from(US), st.floats(0, LAST)))
def test_hard_rows_draw_as_the_full_vocabulary(row, params, u) -> None:
    for sampler in (Sampler(len(row)), Sampler(len(row), fused=False)):
        check_draw(sampler.sample(row, params, u), row, params, u)


def check_draw(draw, row, params, u) -> None:
    assert 0 <= draw.token < len(row)
    assert row[draw.token] > -math.inf
    exact = (params.em or EMInf(steps=0)).apply(row)
    q = softmax(exact.logits)
    assert draw.p_after == pytest.approx(q[draw.token], abs=2e-5)
    cut_off = params.top_k or params.top_p < 1 or params.min_p > 0 or params.temperature < 0.9
    if not cut_off:  # ties and near-ties may be cut or cooled either way
        assert agrees(draw.token, probabilities(exact.logits, params), u)


@pytest.mark.parametrize("temperature", [5.0, 20.0, 100.0])
def test_hot_draws_reach_tokens_that_float32_weights_cannot_hold(make, temperature) -> None:
    row = np.float32([0.0] + [-110.0] * 999)
    params = SamplingParams(temperature=temperature, min_p=0.0)
    p = probabilities(row.astype(float), params)
    for top_k, u in itertools.product((0, 500), (0.3, 0.5, 0.9)):
        params = SamplingParams(temperature=temperature, min_p=0.0, top_k=top_k)
        p = probabilities(row.astype(float), params)
        assert agrees(make(1000).sample(row, params, u).token, p, u)


@pytest.mark.parametrize("temperature", [1e-9, 1e-12, 1e-300, 5e-324])
def test_cold_draws_choose_among_ties(make, temperature) -> None:
    row = np.float32([0.0, 3.0, 1.0, 3.0, -math.inf])
    for em in EMS.values():
        params = SamplingParams(em=em, temperature=temperature, min_p=0.0)
        assert {make(5).sample(row, params, u).token for u in (0.0, 0.4, 0.6, LAST)} == {1, 3}


def test_adam_far_down_the_tail_and_a_top_k_below_the_head(make) -> None:
    """The tail's common factor must neither underflow to 0 nor turn negative."""
    row = np.float32([0.0, 0.0] + [-14.0 - i / 100 for i in range(50)])
    for em in (EMInf(0, 15, 100.0, "adam"), EMInf(0, 15, 1e6, "adam"), EMInf(0, 1, 2e5), EMInf(0, 2, 1e6)):
        draw = make(52).sample(row, SamplingParams(em=em, top_k=5, min_p=0.0), 0.99)
        assert draw.token in (0, 1)
        assert draw.p_after == pytest.approx(0.5, abs=1e-5)


def test_a_draw_does_not_depend_on_what_was_drawn_before(make, recorded) -> None:
    for em in EMS.values():
        params = SamplingParams(em=em, temperature=1.0, min_p=0.0)
        shared = make(recorded.shape[1])
        fresh = [make(recorded.shape[1]).sample(row, params, 0.6) for row in recorded]
        assert [shared.sample(row, params, 0.6) for row in recorded] == fresh
        order = [3, 3, 0, 5, 1, 4, 2]
        assert [shared.sample(recorded[i], params, 0.6) for i in order] == [fresh[i] for i in order]


def test_the_row_is_not_changed(make, smollm2_rows) -> None:
    row = smollm2_rows[4].copy()
    row.setflags(write=False)
    for em in EMS.values():
        params = SamplingParams(em=em, repeat_penalty=1.3, logit_bias=((5, -math.inf),))
        make(len(row)).sample(row, params, 0.5, seen=[1, 2, 3])
    np.testing.assert_array_equal(row, smollm2_rows[4])


def test_a_common_shift_changes_no_draw(make, smollm2_rows) -> None:
    """The sweep may take the row as it is, or shifted to its top."""
    sampler = make(smollm2_rows.shape[1])
    row = np.round(smollm2_rows[5] * 64) / np.float32(64)  # exact under these shifts
    params = SamplingParams(em=EMInf(), temperature=1.0, min_p=0.0)
    for u in US:
        here = sampler.sample(row, params, u)
        for shift in (64, -64, 1024):
            there = sampler.sample(row + np.float32(shift), params, u)
            assert there.token == here.token
            assert there.entropy_after == pytest.approx(here.entropy_after, abs=1e-6)


def test_paths_counts_what_decided(make, smollm2_rows) -> None:
    sampler = make(smollm2_rows.shape[1])
    for row in smollm2_rows:
        sampler.sample(row, SamplingParams(em=EMInf()), 0.5)
    assert sampler.paths == {1e-6: 6}
    H = float(sampler.sample(smollm2_rows[4], SamplingParams(), 0.5).entropy_before)
    sampler.sample(smollm2_rows[4], SamplingParams(em=EMInf(threshold=H)), 0.5)
    assert sampler.paths[0] == 1  # H = δ within rounding, so the reference decides


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_no_distribution(make, bad) -> None:
    for em in EMS.values():
        with pytest.raises(LogitsError):
            make(3).sample(np.float32([0.0, bad, 1.0]), SamplingParams(em=em), 0.5)


def test_one_token_and_one_hot(make) -> None:
    for em, T in itertools.product(EMS.values(), (0.0, 0.5, 1.0, 3.0)):
        params = SamplingParams(em=em, temperature=T, min_p=0.0)
        assert make(1).sample(np.float32([-7]), params, LAST).token == 0
        draw = make(4).sample(np.float32([-math.inf, -math.inf, 2, -math.inf]), params, LAST)
        assert (draw.token, draw.p_before, draw.p_after, draw.entropy_after) == (2, 1, 1, 0)
