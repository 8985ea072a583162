"""The torch engine on a CUDA device: equal draws, no waiting for the device, 16-bit formats, memory.

The contract runs there too (tests/backends/test_contract.py).
"""

import gc
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from emlocal.backends.base import Feed, LoadOptions, Row
from emlocal.backends.device_sampler import most_steps
from emlocal.backends.torch import sampler
from emlocal.backends.torch.backend import TorchBackend, open_folder
from emlocal.backends.torch.sampler import Compiled, TorchSampler, _columns
from emlocal.errors import BackendError
from emlocal.sampling import Draw, Sampler, SamplingParams
from emlocal.settings import EM_PRESETS
from tests.backends.test_device_samplers import DEVICES, EMS, LAST, PARAMS
from tests.cuda import CUDA, ON_CUDA, no_synchronization

pytestmark = list(ON_CUDA)


def drawn(rows: np.ndarray, jobs: list[Row]) -> list[Draw]:
    """Draws on the device; `jobs` name rows by their index."""
    sampler = TorchSampler(rows.shape[1], CUDA)
    return sampler.sample(torch.from_numpy(rows).to(CUDA), [job.sequence for job in jobs], jobs)


def opened(folder: Path, dtype: str, device: str = "cuda") -> TorchBackend:
    options = LoadOptions(context=256, sequences=2, threads=1)
    return open_folder(folder, options, device=device, dtype=dtype)


@pytest.mark.parametrize("em_step", EMS)
def test_it_draws_what_the_reference_draws(smollm2_rows, em_step) -> None:
    jobs = [
        Row(i, SamplingParams(**{**vars(params), "em": EMS[em_step]}), u)
        for params in PARAMS
        for i, u in ((0, 0.77), (4, 0.1), (4, LAST))
    ]
    for job, draw in zip(jobs, drawn(smollm2_rows, jobs), strict=True):
        DEVICES["torch"].check(smollm2_rows[job.sequence], job.params, job.u, draw)


@pytest.mark.parametrize("preset", EM_PRESETS)
def test_presets_on_both_vocabularies_draw_as_the_host(recorded, preset) -> None:
    step, extra = EM_PRESETS[preset]
    params = SamplingParams(em=step, **extra)
    host = Sampler(recorded.shape[1])
    jobs = [Row(i, params, u) for i, u in zip(range(6), itertools.cycle((0.03, 0.42, 0.88)), strict=False)]
    for job, draw in zip(jobs, drawn(recorded, jobs), strict=True):
        DEVICES["torch"].check(recorded[job.sequence], params, job.u, draw)
        assert draw.token == host.sample(recorded[job.sequence], params, job.u).token


def test_rows_together_are_as_alone_bit_for_bit(smollm2_rows) -> None:
    """Tests twenty rows of a kind: a full block, and one that is filled up with copies."""
    kinds = [SamplingParams(em=step, top_k=k) for step, k in itertools.product(EMS.values(), (0, 40))]
    jobs = [Row(i % 6, params, 0.37) for i, params in enumerate(kinds * 20)]
    together = drawn(smollm2_rows, jobs)
    assert together[: len(kinds)] == [drawn(smollm2_rows, [job])[0] for job in jobs[: len(kinds)]]
    assert drawn(smollm2_rows, jobs[::-1]) == together[::-1]


def test_the_compiled_step_is_the_step(recorded) -> None:
    said: list[str] = []
    z = torch.from_numpy(recorded).to(CUDA).double()
    column = torch.ones(len(z), 1, dtype=torch.float64, device=CUDA)
    step = Compiled(said.append)
    for i in range(3):
        allowed = torch.arange(len(z), device=CUDA)[:, None] != i  # one row may not move
        got, expected = (f(z, 0.3 * column, allowed, 2 * column) for f in (step, sampler.descend))
        torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-12, atol=1e-12)
        assert torch.equal(got[2], expected[2])
        z = expected[0]
    assert step._step is not sampler.descend
    assert said == []


@pytest.mark.parametrize("em_step", EMS)
@pytest.mark.parametrize("more", [{}, {"top_k": 40}, {"top_p": 0.9}, {"temperature": 0.0}], ids=str)
def test_nothing_waits_for_the_device_between_logits_and_outcome(smollm2_rows, em_step, more) -> None:
    """Covers all of a block's work: EM step, truncation, draw.

    The single transfer comes after the last block.
    """
    params = SamplingParams(**more, em=EMS[em_step])
    sampler = TorchSampler(smollm2_rows.shape[1], CUDA)
    full = list(range(6)) + [5] * (sampler.block - 6)
    rows = [Row(i, params, 0.4) for i in range(6)]
    raw = torch.from_numpy(smollm2_rows[full]).to(CUDA)
    columns = torch.from_numpy(_columns([rows[i] for i in full])).to(CUDA)[:, :, None]
    structure, rounds = sampler._structure(params), most_steps(params.em)
    with torch.inference_mode():
        expected = sampler._sample_block(raw, columns, *structure, rounds)  # compiles
        with no_synchronization():
            got = sampler._sample_block(raw, columns, *structure, rounds)
    assert torch.equal(got, expected)
    assert got.shape == (sampler.block, 7)


def test_the_check_for_waiting_does_check() -> None:
    numbers = torch.arange(3, device=CUDA)
    with no_synchronization(), pytest.raises(RuntimeError, match="synchroniz"):
        numbers.sum().item()
    assert numbers.sum().item() == 3


def test_float32_is_what_a_cpu_computes(unpacked_tiny: Path) -> None:
    rows = []
    for device in ("cpu", "cuda"):
        engine = opened(unpacked_tiny, "float32", device)
        sequence = engine.open()
        engine.forward([Feed(sequence, list(range(5, 60)), wanted=False)])
        engine.forward([Feed(sequence, [7])])
        rows.append(engine.logits(sequence))
        engine.close()
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-3)


@pytest.mark.real
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.05), ("float16", 0.02)])
def test_sixteen_bits_move_the_distributions_a_little(
    unpacked_smollm2: Path, dtype: str, bound: float
) -> None:
    """Mean total variation over 60 tokens of text. A CPU gave 0.019 in bfloat16."""
    distributions = []
    for each in ("float32", dtype):
        engine = opened(unpacked_smollm2, each)
        text = "The sky is blue because air scatters short waves of light more than long ones. " * 4
        tokens = engine.encode(text, add_special=True, parse_special=False)[:61]
        sequence, rows = engine.open(), []
        for token in tokens:
            engine.forward([Feed(sequence, [token])])
            z = engine.logits(sequence).astype(np.float64)
            rows.append(np.exp(z - z.max()) / np.exp(z - z.max()).sum())
        distributions.append(np.stack(rows[1:]))
        engine.close()
    assert np.abs(distributions[0] - distributions[1]).sum(-1).mean() / 2 < bound
    same = distributions[0].argmax(-1) == distributions[1].argmax(-1)
    assert same.mean() >= 0.85


def test_it_says_where_it_runs_and_leaves_nothing(unpacked_tiny: Path) -> None:
    engine = opened(unpacked_tiny, "auto")  # allocates what is made once, such as cuBLAS's workspace
    sequence = engine.open()
    engine.forward([Feed(sequence, [5, 6])])
    engine.sample([Row(sequence, SamplingParams(em=EMS["sgd"]), 0.5)])
    assert torch.cuda.get_device_name(0) in engine.describe()
    engine.close()
    del engine
    gc.collect()
    before = torch.cuda.memory_allocated()
    again = opened(unpacked_tiny, "auto")
    assert torch.cuda.memory_allocated() > before
    again.close()
    del again
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_more_than_the_device_holds_is_one_line(unpacked_tiny: Path) -> None:
    engine = opened(unpacked_tiny, "float32")
    with pytest.raises(BackendError, match="has no memory for 100,000,000 sequences of 256 tokens"):
        engine._reserve(100_000_000, 256)  # 1.6 TB
    engine.close()
