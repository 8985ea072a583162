"""The samplers on devices draw the same as the reference and as the host's sampler."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch._dynamo
from hypothesis import example, given
from hypothesis import strategies as st
from torch._inductor import config as inductor
from torch.compiler import config as compiler

from emlocal.backends.base import Row
from emlocal.backends.device_sampler import DeviceSampler
from emlocal.backends.mlx.sampler import EDGE, GROUP, MLXSampler, first_above, fixed, part
from emlocal.backends.torch.sampler import Compiled, TorchSampler, descend
from emlocal.em.entropy import log_softmax
from emlocal.em.steps import AdaptiveTemperature, EMInf
from emlocal.errors import LogitsError, UsageError
from emlocal.sampling import Draw, Sampler, SamplingParams
from emlocal.sampling.draw import adjust, inverse_cdf, probabilities
from emlocal.settings import EM_PRESETS
from tests.backends.precision import adam_in_float32
from tests.em.fast_path import hard_rows
from tests.examples import examples
from tests.sampling.test_sampler import EMS, LAST, PARAMS, US, any_params


@dataclass
class Device:
    """A device's sampler and its tolerances to the reference."""

    make: Callable[[int], DeviceSampler]
    array: Callable[[np.ndarray], object]
    edge: float
    """Distance from a border of the exact CDF within which u may give another token."""
    close: float
    """Tolerance of statistics: entropies in nats, and probabilities."""
    bound: Callable[[np.ndarray, EMInf], tuple[float, float]] | None = None
    """Function that bounds Adam's extra error in entropy and total variation; None: no extra error."""

    def __post_init__(self) -> None:
        self._samplers: dict[int, DeviceSampler] = {}

    def drawn(self, rows: np.ndarray, jobs: Sequence[Row]) -> list[Draw]:
        """Draws; `jobs` name rows by their index. The sampler is reused for its compiled code."""
        sampler = self._samplers.setdefault(rows.shape[1], self.make(rows.shape[1]))
        return sampler.sample(self.array(rows), [job.sequence for job in jobs], jobs)

    def check(self, row: np.ndarray, params: SamplingParams, u: float, draw: Draw) -> None:
        z, (before, after, steps) = exactly(row, params)
        plain = row.astype(np.float64)
        for token, logits in ((draw.token, z), (draw.token_without_em, plain)):
            p = probabilities(logits, params)
            expected = inverse_cdf(p, u)
            assert token == expected or self.near_an_edge(token, expected, p, u)
        assert draw.steps == steps
        assert draw.entropy_before == pytest.approx(before, abs=self.close)
        assert draw.entropy_after == pytest.approx(after, abs=self.close)
        p_before, p_after = (float(np.exp(log_softmax(logits)[draw.token])) for logits in (plain, z))
        assert draw.p_before == pytest.approx(p_before, abs=self.close)
        assert draw.p_after == pytest.approx(p_after, abs=self.close)
        if draw.steps == 0:
            assert (draw.token, draw.p_before) == (draw.token_without_em, draw.p_after)

    def near_an_edge(self, token: int, other: int, p: np.ndarray, u: float) -> bool:
        """Whether u lies on the border between the two tokens' shares of the CDF, within `edge`."""
        first, last = sorted((token, other))
        between = p[first + 1 : last].sum()
        return bool(between <= self.edge and abs(p[: first + 1].sum() - u) <= self.edge)


DEVICES = {
    "torch": Device(lambda V: TorchSampler(V, torch.device("cpu")), torch.from_numpy, 1e-9, 1e-6),
    "mlx": Device(lambda V: MLXSampler(V, on_gpu=False), mx.array, EDGE, 2e-5, adam_in_float32),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    return DEVICES[request.param]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine take a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def exactly(row: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, tuple[float, float, int]]:
    """Returns the logits after the reference's EM step in float64, with entropies and steps."""
    result = (params.em or EMInf(steps=0)).apply(row)
    return result.logits, (float(result.entropy_before), float(result.entropy_after), int(result.steps))


@pytest.mark.parametrize("em", EMS)
@pytest.mark.parametrize("params", PARAMS, ids=lambda p: f"T{p.temperature}k{p.top_k}p{p.top_p}m{p.min_p}")
def test_recorded_rows_draw_as_the_reference(device, smollm2_rows, em, params) -> None:
    with_em = SamplingParams(**{**vars(params), "em": EMS[em]})
    jobs = [Row(i, with_em, u) for i, u in ((0, 0.77), (4, 0.1), (4, LAST))]
    for job, draw in zip(jobs, device.drawn(smollm2_rows, jobs), strict=True):
        device.check(smollm2_rows[job.sequence], with_em, job.u, draw)


@pytest.mark.parametrize("preset", EM_PRESETS)
def test_presets_on_both_vocabularies_draw_as_the_host(device, recorded, preset) -> None:
    em, extra = EM_PRESETS[preset]
    params = SamplingParams(em=em, **extra)
    host = Sampler(recorded.shape[1])
    jobs = [Row(i, params, u) for i, u in zip(range(6), itertools.cycle((0.03, 0.42, 0.88)), strict=False)]
    for job, draw in zip(jobs, device.drawn(recorded, jobs), strict=True):
        row = recorded[job.sequence]
        device.check(row, params, job.u, draw)
        assert draw.token == host.sample(row, params, job.u).token


def test_many_uniforms(device, smollm2_rows) -> None:
    """Tests the whole CDF of an open row, with one EM step for each u: every outcome is the reference's."""
    params = SamplingParams(em=EMInf(steps=1), temperature=2.0, min_p=0.0)
    z, _ = exactly(smollm2_rows[5], params)
    p = probabilities(z, params)
    us = np.random.default_rng(0).random(60).tolist()
    for u, draw in zip(us, device.drawn(smollm2_rows, [Row(5, params, u) for u in us]), strict=True):
        assert draw.token == inverse_cdf(p, u) or device.near_an_edge(draw.token, inverse_cdf(p, u), p, u)


def nearly_flat(tokens: int, seed: int) -> np.ndarray:
    """Returns logits of 25 ± 1e-4, the row with the weakest float32 bound for an Adam step."""
    return (25 + np.random.default_rng(seed).normal(0, 1e-4, tokens)).astype(np.float32)


@pytest.mark.parametrize("name", DEVICES)
@examples(150)
@given(hard_rows(), any_params(), st.one_of(st.sampled_from(US), st.floats(0, LAST)))
@example(nearly_flat(140, 3), SamplingParams(em=EMS["em-pt"], temperature=1, min_p=0), 0.5)
@example(nearly_flat(300, 3), SamplingParams(em=EMS["em-pt"], temperature=1, min_p=0), 0.77)
def test_hard_rows(name, row, params, u) -> None:
    device = DEVICES[name]
    draw = device.drawn(row[None], [Row(0, params, u)])[0]
    assert 0 <= draw.token < len(row)
    assert row[draw.token] > -math.inf
    z, (before, after, steps) = exactly(row, params)
    assert draw.entropy_before == pytest.approx(before, abs=device.close)
    of_entropy = of_cdf = 0.0
    if device.bound and isinstance(params.em, EMInf) and params.em.optimizer == "adam":
        of_entropy, of_cdf = device.bound(row, params.em)
    if draw.steps != steps:  # H = δ within rounding may take one step more or less
        return
    assert draw.entropy_after == pytest.approx(after, abs=max(device.close, 1e-5) + of_entropy)
    cut_off = params.top_k or params.top_p < 1 or params.min_p > 0 or params.temperature < 0.9
    if not cut_off:  # ties and near-ties may be cut or cooled either way
        p = probabilities(z, params)
        below = float(p[: draw.token].sum())
        off = 1e-6 + 2 * of_cdf
        assert below - off <= u <= below + float(p[draw.token]) + off


def test_rows_together_are_as_alone_bit_for_bit(device, smollm2_rows) -> None:
    kinds = [
        SamplingParams(em=em, top_k=k, top_p=p, temperature=T)
        for em, (k, p, T) in itertools.product(EMS.values(), ((0, 1, 0.8), (40, 0.9, 1.3), (0, 0.9, 0.0)))
    ]
    jobs = [Row(i % 6, params, 0.37) for i, params in enumerate(kinds)]
    together = device.drawn(smollm2_rows, jobs)
    assert together == [device.drawn(smollm2_rows, [job])[0] for job in jobs]
    assert device.drawn(smollm2_rows, jobs[::-1]) == together[::-1]


def test_penalties_and_biases_are_the_hosts(device, smollm2_rows) -> None:
    seen = [5, 5, 9, 100, 9, 5, 77, 30000]
    for params in (
        SamplingParams(repeat_penalty=1.7, temperature=1.0, min_p=0.0),
        SamplingParams(presence_penalty=1.5, frequency_penalty=0.3, repeat_last_n=3, temperature=1.0),
        SamplingParams(logit_bias=((7, 50.0), (8, -math.inf)), repeat_penalty=2.0, repeat_last_n=-1),
        SamplingParams(logit_bias=((int(smollm2_rows[1].argmax()), -math.inf),), temperature=0),
    ):
        jobs = [Row(i, params, 0.6, seen) for i in range(4)]
        for job, draw in zip(jobs, device.drawn(smollm2_rows, jobs), strict=True):
            device.check(adjust(smollm2_rows[job.sequence], params, seen), params, job.u, draw)
    with pytest.raises(UsageError, match="names token 49152"):
        device.drawn(smollm2_rows, [Row(0, SamplingParams(logit_bias=((49152, 1.0),)), 0.5)])


def test_greedy_ties_go_to_the_lower_token(device) -> None:
    row = np.float32([[0, 3, 1, 3, 3, -math.inf]])
    for em in (None, EMInf(), AdaptiveTemperature()):
        assert device.drawn(row, [Row(0, SamplingParams(em=em, temperature=0), 0.9)])[0].token == 1
    params = SamplingParams(temperature=1e-12, min_p=0.0)
    assert {device.drawn(row, [Row(0, params, u)])[0].token for u in (0.0, 0.5, LAST)} == {1, 3, 4}


def test_rows_that_are_no_distribution_are_named_and_spoil_no_other(device, smollm2_rows) -> None:
    rows = smollm2_rows[:4].copy()
    rows[1, 7], rows[2, 9], rows[3] = math.nan, math.inf, -math.inf
    for bad, message in ((1, "NaN"), (2, r"\+inf"), (3, "every token")):
        for em in EMS.values():
            with pytest.raises(LogitsError, match=message):
                device.drawn(rows, [Row(0, SamplingParams(em=em), 0.5), Row(bad, SamplingParams(em=em), 0.5)])
    assert device.drawn(rows, [Row(0, SamplingParams(), 0.5)]) == device.drawn(
        smollm2_rows, [Row(0, SamplingParams(), 0.5)]
    )


def test_one_token_and_one_hot(device) -> None:
    for em, T in itertools.product(EMS.values(), (0.0, 0.5, 3.0)):
        params = SamplingParams(em=em, temperature=T, min_p=0.0)
        assert device.drawn(np.float32([[-7]]), [Row(0, params, LAST)])[0].token == 0
        draw = device.drawn(np.float32([[-math.inf, -math.inf, 2, -math.inf]]), [Row(0, params, LAST)])[0]
        assert (draw.token, draw.p_before, draw.p_after, draw.entropy_after) == (2, 1, 1, 0)


def test_the_logits_are_not_changed(device, smollm2_rows) -> None:
    rows = smollm2_rows.copy()
    device.drawn(rows, [Row(4, SamplingParams(em=EMInf(), repeat_penalty=1.3), 0.5, [1, 2, 3])])
    np.testing.assert_array_equal(rows, smollm2_rows)


@pytest.fixture
def new_compilation() -> Iterator[None]:
    """Prevents the use of code that was compiled before, in this process or on disk."""
    torch._dynamo.reset()
    with compiler.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def assert_descends(step: Compiled) -> None:
    """Runs two steps on a row that moves, one that is already certain and one that may not move."""
    z = torch.tensor([[0.0, 1.0, 0.5], [0.0, 30.0, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)
    threshold, rate = torch.full((3, 1), 0.1).double(), torch.tensor([[1.0], [1.0], [2.0]]).double()
    allowed = torch.tensor([[True], [True], [False]])
    for _ in range(2):
        moved, H, active = step(z, threshold, allowed, rate)
        expected = descend(z, threshold, allowed, rate)
        torch.testing.assert_close(moved, expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(H, expected[1], rtol=1e-12, atol=1e-12)
        assert active.flatten().tolist() == [True, False, False]
        assert torch.equal(moved[1:], z[1:])
        z = moved


@pytest.mark.usefixtures("new_compilation")
def test_a_compiled_step_is_the_step() -> None:
    said: list[str] = []
    step = Compiled(said.append)
    assert_descends(step)
    assert step._step is not descend
    assert said == []


@pytest.mark.usefixtures("new_compilation")
def test_without_a_compiler_the_step_is_taken_as_it_is() -> None:
    said: list[str] = []
    step = Compiled(said.append)
    with inductor.patch({"cpp.cxx": ("/no/such/compiler",)}):
        assert_descends(step)
    assert step._step is descend
    (message,) = said
    assert message.startswith("torch.compile failed (")


def test_sums_are_exact_to_the_last_unit() -> None:
    """Compares u · total with Python's integers, and the index with a search of the exact prefix sums."""
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
