"""MLX's sampler in float32 draws what the reference draws, except within EDGE of a border of its CDF."""

import itertools
import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from emlocal.backends.base import Row
from emlocal.backends.mlx.draw import first_above, fixed, part
from emlocal.backends.mlx.em import GROUP
from emlocal.backends.mlx.sampler import EDGE, MLXSampler
from emlocal.em.entropy import log_softmax
from emlocal.em.steps import EMInf
from emlocal.errors import LogitsError, UsageError
from emlocal.sampling import Draw, Sampler, SamplingParams
from emlocal.sampling.penalties import adjust
from emlocal.sampling.reference import inverse_cdf, probabilities
from emlocal.settings import EM_PRESETS, AdaptiveTemperature
from tests.em.fast_path import hard_rows
from tests.sampling.test_sampler import EMS, LAST, PARAMS, US, any_params

SAMPLERS: dict[int, MLXSampler] = {}
"""By vocabulary: what one has compiled, later tests need not compile again."""
CLOSE = 2e-5
"""How far statistics in float32 lie from the reference's: entropies in nats, and probabilities."""


def drawn(rows: np.ndarray, jobs: Sequence[Row]) -> list[Draw]:
    """`jobs` name rows by their index."""
    sampler = SAMPLERS.setdefault(rows.shape[1], MLXSampler(rows.shape[1], on_gpu=False))
    return sampler.sample(mx.array(rows), [job.sequence for job in jobs], jobs)


def exactly(row: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, tuple[float, float, int]]:
    """Logits after the reference's EM step, float64; entropies and steps."""
    result = (params.em or EMInf(steps=0)).apply(row)
    return result.logits, (float(result.entropy_before), float(result.entropy_after), int(result.steps))


def near_an_edge(token: int, other: int, p: np.ndarray, u: float) -> bool:
    """Whether u lies on the border between the two tokens' shares of the CDF, within EDGE."""
    first, last = sorted((token, other))
    between = p[first + 1 : last].sum()
    return bool(between <= EDGE and abs(p[: first + 1].sum() - u) <= EDGE)


def check(row: np.ndarray, params: SamplingParams, u: float, draw: Draw) -> None:
    z, (before, after, steps) = exactly(row, params)
    plain = row.astype(np.float64)
    for token, logits in ((draw.token, z), (draw.token_without_em, plain)):
        p = probabilities(logits, params)
        expected = inverse_cdf(p, u)
        assert token == expected or near_an_edge(token, expected, p, u)
    assert draw.steps == steps
    assert draw.entropy_before == pytest.approx(before, abs=CLOSE)
    assert draw.entropy_after == pytest.approx(after, abs=CLOSE)
    assert draw.p_before == pytest.approx(float(np.exp(log_softmax(plain)[draw.token])), abs=CLOSE)
    assert draw.p_after == pytest.approx(float(np.exp(log_softmax(z)[draw.token])), abs=CLOSE)
    if draw.steps == 0:
        assert (draw.token, draw.p_before) == (draw.token_without_em, draw.p_after)


@pytest.mark.parametrize("em", EMS)
@pytest.mark.parametrize("params", PARAMS, ids=lambda p: f"T{p.temperature}k{p.top_k}p{p.top_p}m{p.min_p}")
def test_recorded_rows_draw_as_the_reference(smollm2_rows, em, params) -> None:
    with_em = SamplingParams(**{**vars(params), "em": EMS[em]})
    jobs = [Row(i, with_em, u) for i, u in ((0, 0.77), (4, 0.1), (4, LAST))]
    for job, draw in zip(jobs, drawn(smollm2_rows, jobs), strict=True):
        check(smollm2_rows[job.sequence], with_em, job.u, draw)


@pytest.mark.parametrize("preset", EM_PRESETS)
def test_presets_on_both_vocabularies_draw_as_the_host(recorded, preset) -> None:
    em, extra = EM_PRESETS[preset]
    params = SamplingParams(em=em, **extra)
    host = Sampler(recorded.shape[1])
    jobs = [Row(i, params, u) for i, u in zip(range(6), itertools.cycle((0.03, 0.42, 0.88)), strict=False)]
    for job, draw in zip(jobs, drawn(recorded, jobs), strict=True):
        row = recorded[job.sequence]
        check(row, params, job.u, draw)
        assert draw.token == host.sample(row, params, job.u).token


def test_many_uniforms(smollm2_rows) -> None:
    """The whole CDF of an open row, by one EM step per u: every outcome is the reference's."""
    params = SamplingParams(em=EMInf(steps=1), temperature=2.0, min_p=0.0)
    z, _ = exactly(smollm2_rows[5], params)
    p = probabilities(z, params)
    us = np.random.default_rng(0).random(60).tolist()
    for u, draw in zip(us, drawn(smollm2_rows, [Row(5, params, u) for u in us]), strict=True):
        assert draw.token == inverse_cdf(p, u) or near_an_edge(draw.token, inverse_cdf(p, u), p, u)


def has_hidden_order(row) -> bool:
    """Whether tokens differ by less than float32's probabilities can tell. Adam's steps have the size of the
    learning rate however small the gradient is: three of them on 1e-15 part what is tied in float32."""
    gaps = np.diff(np.unique(row[np.isfinite(row)].astype(np.float64)))
    return bool((gaps < 1e-6).any())


@hypothesis_settings(max_examples=150, deadline=None)
@given(hard_rows(), any_params(), st.one_of(st.sampled_from(US), st.floats(0, LAST)))
def test_hard_rows(row, params, u) -> None:
    assume(not (isinstance(params.em, EMInf) and params.em.optimizer == "adam" and has_hidden_order(row)))
    draw = drawn(row[None], [Row(0, params, u)])[0]
    assert 0 <= draw.token < len(row)
    assert row[draw.token] > -math.inf
    z, (before, after, steps) = exactly(row, params)
    assert draw.entropy_before == pytest.approx(before, abs=CLOSE)
    if abs(draw.steps - steps) == 0:  # H = δ within rounding may take one step more or less
        assert draw.entropy_after == pytest.approx(after, abs=CLOSE)
    cut_off = params.top_k or params.top_p < 1 or params.min_p > 0 or params.temperature < 0.9
    if not cut_off and draw.steps == steps:  # ties and near-ties may be cut or cooled apart either way
        p = probabilities(z, params)
        below = float(p[: draw.token].sum())
        assert below - 1e-6 <= u <= below + float(p[draw.token]) + 1e-6


def test_rows_together_are_as_alone_bit_for_bit(smollm2_rows) -> None:
    kinds = [
        SamplingParams(em=em, top_k=k, top_p=p, temperature=T)
        for em, (k, p, T) in itertools.product(EMS.values(), ((0, 1, 0.8), (40, 0.9, 1.3), (0, 0.9, 0.0)))
    ]
    jobs = [Row(i % 6, params, 0.37) for i, params in enumerate(kinds)]
    together = drawn(smollm2_rows, jobs)
    assert together == [drawn(smollm2_rows, [job])[0] for job in jobs]
    assert drawn(smollm2_rows, jobs[::-1]) == together[::-1]


def test_penalties_and_biases_are_the_hosts(smollm2_rows) -> None:
    seen = [5, 5, 9, 100, 9, 5, 77, 30000]
    for params in (
        SamplingParams(repeat_penalty=1.7, temperature=1.0, min_p=0.0),
        SamplingParams(presence_penalty=1.5, frequency_penalty=0.3, repeat_last_n=3, temperature=1.0),
        SamplingParams(logit_bias=((7, 50.0), (8, -math.inf)), repeat_penalty=2.0, repeat_last_n=-1),
        SamplingParams(logit_bias=((int(smollm2_rows[1].argmax()), -math.inf),), temperature=0),
    ):
        jobs = [Row(i, params, 0.6, seen) for i in range(4)]
        for job, draw in zip(jobs, drawn(smollm2_rows, jobs), strict=True):
            check(adjust(smollm2_rows[job.sequence], params, seen), params, job.u, draw)
    with pytest.raises(UsageError, match="names token 49152"):
        drawn(smollm2_rows, [Row(0, SamplingParams(logit_bias=((49152, 1.0),)), 0.5)])


def test_greedy_ties_go_to_the_lower_token() -> None:
    row = np.float32([[0, 3, 1, 3, 3, -math.inf]])
    for em in (None, EMInf(), AdaptiveTemperature()):
        assert drawn(row, [Row(0, SamplingParams(em=em, temperature=0), 0.9)])[0].token == 1
    params = SamplingParams(temperature=1e-12, min_p=0.0)
    assert {drawn(row, [Row(0, params, u)])[0].token for u in (0.0, 0.5, LAST)} == {1, 3, 4}


def test_rows_that_are_no_distribution_are_named_and_spoil_no_other(smollm2_rows) -> None:
    rows = smollm2_rows[:4].copy()
    rows[1, 7], rows[2, 9], rows[3] = math.nan, math.inf, -math.inf
    for bad, message in ((1, "NaN"), (2, r"\+inf"), (3, "every token")):
        for em in EMS.values():
            with pytest.raises(LogitsError, match=message):
                drawn(rows, [Row(0, SamplingParams(em=em), 0.5), Row(bad, SamplingParams(em=em), 0.5)])
    assert drawn(rows, [Row(0, SamplingParams(), 0.5)]) == drawn(
        smollm2_rows, [Row(0, SamplingParams(), 0.5)]
    )


def test_one_token_and_one_hot() -> None:
    for em, T in itertools.product(EMS.values(), (0.0, 0.5, 3.0)):
        params = SamplingParams(em=em, temperature=T, min_p=0.0)
        assert drawn(np.float32([[-7]]), [Row(0, params, LAST)])[0].token == 0
        draw = drawn(np.float32([[-math.inf, -math.inf, 2, -math.inf]]), [Row(0, params, LAST)])[0]
        assert (draw.token, draw.p_before, draw.p_after, draw.entropy_after) == (2, 1, 1, 0)


def test_the_logits_are_not_changed(smollm2_rows) -> None:
    rows = smollm2_rows.copy()
    drawn(rows, [Row(4, SamplingParams(em=EMInf(), repeat_penalty=1.3), 0.5, [1, 2, 3])])
    np.testing.assert_array_equal(rows, smollm2_rows)


def test_sums_are_exact_to_the_last_unit() -> None:
    """u · total against Python's integers, and the index against a search of the exact prefix sums."""
    rng = np.random.default_rng(3)
    weights = rng.random((3, 4 * GROUP)).astype(np.float32) ** 40
    whole = np.array(fixed(mx.array(weights)))
    np.testing.assert_array_equal(whole, np.floor(weights.astype(np.float64) * 2.0**44).astype(np.uint64))
    sums = np.cumsum(whole, axis=1)
    for u in (0.0, 2**-53, 0.25, 1 / 3, 0.9999999, LAST):
        fraction = mx.array(np.full((3, 1), int(u * 2**64), dtype=np.uint64))
        target = part(mx.array(sums[:, -1:]), fraction)
        exact = [int(total) * int(u * 2**64) >> 64 for total in sums[:, -1]]
        assert all(0 <= want - int(got) <= 2 for want, got in zip(exact, target[:, 0].tolist(), strict=True))
        found = first_above(mx.array(whole), target)[:, 0].tolist()
        aims = np.array(target)[:, 0]
        assert found == [int(np.searchsorted(sums[i], aims[i], side="right")) for i in range(3)]
