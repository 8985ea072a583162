"""Masks of legal tokens: the compiled sampler, numpy and the devices draw what the reference draws from a row
whose other tokens are at −inf."""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emlocal.backends.base import Row
from emlocal.backends.mlx.sampler import MLXSampler
from emlocal.backends.torch.sampler import TorchSampler
from emlocal.em.entropy import entropy
from emlocal.em.steps import AdaptiveTemperature, EMInf
from emlocal.errors import LogitsError
from emlocal.sampling import Draw, Mask, Sampler, SamplingParams, _fused
from emlocal.sampling.sampler import Fused
from tests.examples import examples

SETTINGS = [
    SamplingParams(em=em, **settings)  # type: ignore[arg-type]
    for em in (None, EMInf(), EMInf(threshold=0.1, steps=15, learning_rate=1.0), AdaptiveTemperature())
    for settings in (
        {},
        {"temperature": 0.0},
        {"temperature": 1.0, "min_p": 0.0},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"temperature": 0.8, "dynatemp_range": 0.5},
        {"logit_bias": ((3, 4.0), (5, -math.inf))},
    )
]


def mask_of(legal: np.ndarray) -> Mask:
    """Packed, with bytes to spare and their bits set: an engine must not look at them."""
    packed = np.packbits(legal, bitorder="little")
    if len(legal) % 8:
        packed[-1] |= 0xFF << len(legal) % 8 & 0xFF
    return np.concatenate([packed, np.full(3, 255, np.uint8)])


def masked(row: np.ndarray, legal: np.ndarray) -> np.ndarray:
    return np.where(legal, row, -np.inf).astype(np.float32)


def some_legal(vocabulary: int, seed: int, share: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    legal = rng.random(vocabulary) < share
    legal[rng.integers(vocabulary)] = True
    return legal


def same(ours: Draw, theirs: Draw, close: float = 1e-6) -> None:
    assert (ours.token, ours.token_without_em, ours.steps) == (
        theirs.token,
        theirs.token_without_em,
        theirs.steps,
    )
    assert tuple(ours) == pytest.approx(tuple(theirs), abs=close)


@pytest.mark.parametrize("share", [1e-5, 1e-3, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_a_mask_is_a_row_with_the_other_tokens_at_minus_infinity(recorded, share, fused) -> None:
    vocabulary = recorded.shape[1]
    sampler, plain = Sampler(vocabulary, fused=fused), Sampler(vocabulary, fused=False)
    for i, params in enumerate(SETTINGS):
        row = recorded[i % len(recorded)]
        legal = some_legal(vocabulary, i, share)
        u = (i * 0.618) % 1
        ours = sampler.sample(row, params, u, legal=mask_of(legal))
        assert legal[ours.token]
        assert legal[ours.token_without_em]
        cooled = isinstance(params.em, AdaptiveTemperature)  # both keep the contract, each in its own way
        same(ours, plain.sample(masked(row, legal), params, u), 1e-5 if cooled else 1e-6)


def test_the_compiled_sampler_takes_masked_rows(recorded) -> None:
    vocabulary = recorded.shape[1]
    fused, params = Fused(vocabulary), SamplingParams(em=EMInf())
    draws = [
        fused.draw(row, params, 0.4, mask_of(some_legal(vocabulary, i, 0.5)))
        for i, row in enumerate(recorded)
    ]
    assert sum(draw is not None for draw in draws) > 0.85 * len(draws)


@pytest.mark.parametrize("vocabulary", [7, 64, 100, 128, 1003, 4096])
def test_every_register_width_masks_alike(vocabulary) -> None:
    row = np.random.default_rng(1).normal(0, 3, vocabulary).astype(np.float32)
    params = SamplingParams(em=EMInf(), temperature=1.0, min_p=0.0)
    for share, u in ((0.1, 0.2), (0.5, 0.7), (0.95, 0.99)):
        legal = some_legal(vocabulary, 3, share)
        expected = Sampler(vocabulary, fused=False).sample(masked(row, legal), params, u)
        for width in (16, 32, 64):
            _fused.limit_width(width)
            same(Sampler(vocabulary).sample(row, params, u, legal=mask_of(legal)), expected)
    _fused.limit_width(64)


def test_a_mask_that_is_too_short_is_refused() -> None:
    fused = Fused(100)
    with pytest.raises(ValueError, match="100 tokens need a mask of 13 bytes"):
        fused.draw(np.zeros(100, np.float32), SamplingParams(), 0.5, np.full(12, 255, np.uint8))


def test_no_legal_token_is_an_error() -> None:
    for fused in (False, True):
        with pytest.raises(LogitsError, match="masked"):
            Sampler(100, fused=fused).sample(
                np.zeros(100, np.float32), SamplingParams(), 0.5, legal=np.zeros(13, np.uint8)
            )


ROWS = st.integers(0, 2**32 - 1)


@examples(60)
@given(ROWS, st.sampled_from([0.02, 0.3, 1.0]), st.sampled_from(SETTINGS), st.floats(0, 0.999))
@pytest.mark.parametrize("vocabulary", [9, 64, 1003])
def test_any_mask_on_any_row(vocabulary, seed, share, params, u) -> None:
    row = (4 * np.random.default_rng(seed).standard_normal(vocabulary)).astype(np.float32)
    legal = some_legal(vocabulary, seed, share)
    legal[8] = True  # 5 is banned by a bias
    ours = Sampler(vocabulary).sample(row, params, u, legal=mask_of(legal))
    theirs = Sampler(vocabulary, fused=False).sample(masked(row, legal), params, u)
    same(ours, theirs)
    if not params.logit_bias:
        z = row[legal].astype(np.float64)
        assert ours.entropy_before == pytest.approx(float(entropy(z)), abs=1e-6)  # over the legal tokens


DEVICES = {
    "torch": (lambda V: TorchSampler(V, torch.device("cpu")), torch.from_numpy, 1e-5),
    "mlx": (lambda V: MLXSampler(V, on_gpu=False), mx.array, 3e-5),
}


@pytest.mark.parametrize("device", DEVICES)
def test_devices_mask_as_the_host_does(device) -> None:
    """Rows with and without a mask in one block, V no multiple of anything."""
    make, array, close = DEVICES[device]
    vocabulary = 1003
    sampler, host = make(vocabulary), Sampler(vocabulary, fused=False)
    rows = (4 * np.random.default_rng(1).standard_normal((6, vocabulary))).astype(np.float32)
    for params in SETTINGS:
        shares = [0.01, None, 0.2, 1.0, None, 0.002]
        legal = [None if s is None else some_legal(vocabulary, i, s) for i, s in enumerate(shares)]
        for each in legal:
            if each is not None:
                each[8] = True
        jobs = [
            Row(i, params, 0.1 + 0.15 * i, (), None if each is None else mask_of(each))
            for i, each in enumerate(legal)
        ]
        drawn = sampler.sample(array(rows), list(range(6)), jobs)
        for job, row, ours in zip(jobs, rows, drawn, strict=True):
            same(ours, host.sample(row, params, job.u, legal=job.legal), close)
