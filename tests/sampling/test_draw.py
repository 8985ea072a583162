import math
from collections import Counter

import numpy as np
import pytest

from emlocal.sampling import Uniforms
from emlocal.sampling.draw import inverse_cdf, request_key
from emlocal.settings import MAX_SEED

MASK = 2**64 - 1


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Computes Philox4x64-10 in Python's integers, from the definition in Salmon et al. 2011."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [second >> 64 ^ c[1] ^ k[0], second & MASK, first >> 64 ^ c[3] ^ k[1], first & MASK]
        k = [k[0] + 0x9E3779B97F4A7C15 & MASK, k[1] + 0xBB67AE8584CAA73B & MASK]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123's kat_vectors, philox4x64 10
        (
            [0, 0, 0, 0],
            [0, 0],
            [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B],
        ),
        (
            [MASK] * 4,
            [MASK] * 2,
            [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0],
        ),
        (
            [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
            [0x452821E638D01377, 0xBE5466CF34E90C6C],
            [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
        ),
    ],
)
def test_known_answers(counter, key, answer) -> None:
    assert philox(counter, key) == answer
    number = sum(word << 64 * i for i, word in enumerate(counter))
    before = (number - 1) % 2**256  # numpy counts up before use
    raw = np.random.Philox(key=key[0] | key[1] << 64, counter=before).random_raw(4)
    assert raw.tolist() == answer


@pytest.mark.parametrize(("seed", "key", "sample"), [(0, 0, 0), (42, 7, 3), (MAX_SEED, MASK, 2**40)])
def test_token_t_has_word_t_of_the_counter_stream(seed: int, key: int, sample: int) -> None:
    uniforms = Uniforms(seed, key, sample)
    for t in (0, 1, 3, 4, 63, 64, 65, 200, 100_003):
        word = philox([t // 4 + 1, sample, 0, 0], [seed, key])[t % 4]
        assert uniforms[t] == (word >> 11) * 2.0**-53


@pytest.mark.parametrize("start", [0, 1, 63, 64, 1000])
def test_an_answer_that_was_begun_goes_on_in_the_same_stream(start: int) -> None:
    whole, rest = Uniforms(5, 6, 7), Uniforms(5, 6, 7, start)
    assert [rest[t] for t in range(130)] == [whole[start + t] for t in range(130)]


def test_the_stream_never_changes() -> None:
    """Recorded seeds depend on it: a change here breaks every recorded run."""
    assert [Uniforms(0)[t] for t in range(2)] == [0.011546754286331562, 0.24154919656271812]
    assert request_key("a") == 0x2F42665B399EF840
    assert Uniforms(42, request_key("a"), 1)[1000] == 0.42563872336548436


def test_random_access_equals_sequential() -> None:
    sequential = [Uniforms(5, 6, 7)[t] for t in range(300)]
    uniforms = Uniforms(5, 6, 7)
    order = np.random.default_rng(0).permutation(300)
    assert [uniforms[int(t)] for t in order] == [sequential[t] for t in order]


def test_seeds_keys_and_samples_have_streams_of_their_own() -> None:
    addresses = [(s, k, n) for s in (0, 1, 2, MAX_SEED) for k in (0, 1, 9) for n in (0, 1, 2)]
    streams = [tuple(Uniforms(*a)[t] for t in range(128)) for a in addresses]
    everything = Counter(u for stream in streams for u in stream)
    assert len(everything) == 128 * len(addresses)  # not even shifted copies share a number
    for a in streams[:6]:
        for b in streams[6:12]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.4  # 4.5 sigma


def test_seeds_out_of_range_are_refused() -> None:
    for seed in (-1, MAX_SEED + 1):
        with pytest.raises(OverflowError):
            Uniforms(seed)[0]


def test_request_keys_differ_and_fit_64_bits() -> None:
    keys = {request_key(f"request-{i}") for i in range(2000)} | {request_key(""), request_key("é")}
    assert len(keys) == 2002
    assert all(0 <= key <= MASK for key in keys)


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 40,000 draws from 20 tokens, some rare. The seed is fixed, so this cannot be flaky."""
    rng = np.random.default_rng(3)
    weights = rng.dirichlet(np.full(20, 0.5))
    n = 40_000
    counts = np.zeros(20)
    for sample in range(20):
        uniforms = Uniforms(2024, 1, sample)
        for t in range(n // 20):
            counts[inverse_cdf(weights, uniforms[t])] += 1
    expected = n * weights
    common = expected >= 5
    chi2 = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    freedom = int(common.sum()) - 1
    assert freedom > 10
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)
    assert counts[~common].sum() <= expected[~common].sum() + 15


def test_uniforms_are_uniform() -> None:
    u = np.array([Uniforms(9, 9, sample)[t] for sample in range(50) for t in range(200)])
    assert (u >= 0).all()
    assert (u < 1).all()
    counts = np.histogram(u, 50, (0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 49 + 4 * math.sqrt(98)


class TestInverseCDF:
    def test_by_hand(self) -> None:
        weights = np.array([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
        for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)):
            assert inverse_cdf(weights, u) == token

    def test_weight_0_is_never_drawn(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(200):
            weights = rng.random(9) * (rng.random(9) < 0.4) * 10.0 ** rng.integers(-300, 300)
            if not weights.any():
                continue
            for u in (0.0, 2.0**-53, 0.5, 1 - 2.0**-53, rng.random()):
                assert weights[inverse_cdf(weights, u)] > 0
