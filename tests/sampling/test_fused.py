"""The compiled sampler compared with the numpy one: inputs, equal results, and bad arguments."""

import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import emlocal
from emlocal.em.steps import AdaptiveTemperature, EMInf
from emlocal.em.steps.em_inf import EM_PRESETS
from emlocal.em.steps.power import Power
from emlocal.sampling import Sampler, SamplingParams, Uniforms, _fused
from emlocal.sampling.sampler import BUILT, Fused

STEPS = {
    "none": None,
    "default": EMInf(),
    "paper": EM_PRESETS["paper"][0],
    "KL": EMInf(kl_weight=0.1),
    "em-pt": EM_PRESETS["em-pt"][0],
    "adaptive": AdaptiveTemperature(),
    "slightly adaptive": AdaptiveTemperature(ratio=0.95),
    "power": Power(2.0),
}
CLOSE = {"none": 1e-8, "default": 1e-8, "paper": 1e-8, "KL": 1e-8}
"""How near numpy it is where both do the same. Elsewhere each keeps the contract in its own way."""
USUAL = {
    name: [
        SamplingParams(em=em, **settings)
        for settings in (
            {},
            {"temperature": 0.0},
            {"temperature": 1.0, "min_p": 0.0},
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
            {"temperature": 1.4, "top_p": 0.95, "min_p": 0.0},
            {"temperature": 0.8, "dynatemp_range": 0.5, "dynatemp_exponent": 0.7},
        )
    ]
    for name, em in STEPS.items()
}


def test_it_is_built() -> None:
    assert BUILT, "install emlocal where GCC or clang is, with pip install -e"


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("name", STEPS)
def test_it_takes_nearly_all_usual_rows_and_says_what_numpy_says(recorded, width, name) -> None:
    vocabulary, uniforms = recorded.shape[1], Uniforms(7)
    plain, fused = Sampler(vocabulary, fused=False), Fused(vocabulary)
    taken: Counter[bool] = Counter()
    _fused.limit_width(width)
    for params in USUAL[name]:
        for i, row in enumerate(recorded):
            ours, theirs = fused.draw(row, params, uniforms[i]), plain.sample(row, params, uniforms[i])
            taken[ours is not None] += 1
            if ours is None:
                continue
            assert (ours.token, ours.steps) == (theirs.token, theirs.steps)
            assert ours.token_without_em == theirs.token_without_em
            assert ours[1:] == pytest.approx(theirs[1:], abs=CLOSE.get(name, 1e-4))
    assert taken[True] > (0.7 if name == "em-pt" else 0.85) * taken.total()
    _fused.limit_width(64)


@pytest.mark.parametrize("name", STEPS)
def test_it_is_as_near_the_reference_as_it_promises(recorded, name) -> None:
    """Each token's probability, for tokens from all over the row."""
    fused = Fused(recorded.shape[1])
    for row in recorded:
        exact = (STEPS[name] or EMInf(steps=0)).apply(row)
        p = np.exp(exact.logits - exact.logits.max())
        p /= p.sum()
        for u in np.linspace(0, 1, 20, endpoint=False):
            draw = fused.draw(row, SamplingParams(em=STEPS[name], temperature=1.0, min_p=0.0), float(u))
            if draw is not None:
                assert draw.p_after == pytest.approx(p[draw.token], abs=1e-5)
                assert draw.steps == exact.steps


def test_widths_agree_with_each_other(recorded) -> None:
    fused, drawn = Fused(recorded.shape[1]), []
    for width in (16, 32, 64):
        _fused.limit_width(width)
        drawn.append(
            [fused.draw(row, SamplingParams(em=em), 0.3) for em in STEPS.values() for row in recorded]
        )
    for others in drawn[1:]:
        assert [draw.token for draw in others if draw] == [draw.token for draw in drawn[0] if draw]
        np.testing.assert_allclose([d[1:] for d in others if d], [d[1:] for d in drawn[0] if d], atol=1e-7)


def test_what_it_leaves_to_numpy(smollm2_rows) -> None:
    fused, row = Fused(smollm2_rows.shape[1]), smollm2_rows[4]
    assert fused.draw(row, SamplingParams(em=EMInf()), 0.5) is not None
    wild = EMInf(steps=15, learning_rate=1e4, optimizer="adam", kl_weight=100.0)
    assert fused.draw(row, SamplingParams(em=wild), 0.5) is None
    for bad in (math.nan, math.inf):
        broken = row.copy()
        broken[-1] = bad
        assert fused.draw(broken, SamplingParams(), 0.5) is None
    assert fused.draw(np.full_like(row, -math.inf), SamplingParams(), 0.5) is None
    assert fused.draw(row + np.float32(100), SamplingParams(), 0.5) is None
    assert fused.draw(np.zeros_like(row), SamplingParams(em=EMInf()), 0.5) is not None
    assert fused.draw(row.astype(np.float64), SamplingParams(), 0.5) is None
    assert fused.draw(row[:-1], SamplingParams(), 0.5) is None


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 127, 128, 129, 1000])
def test_every_row_length_and_every_place_of_the_top(size) -> None:
    """Nothing outside the row is read: the row lies between tokens that would win every draw."""
    fused = Fused(size)
    for top in {0, size // 2, size - 1}:
        around = np.full(size + 256, 30, dtype=np.float32)
        row = around[128 : 128 + size]
        row[:] = np.linspace(-9, -8, size)
        row[top] = 0
        draw = fused.draw(row, SamplingParams(em=EMInf(), temperature=1.0, min_p=0.0), 0.0)
        assert draw is not None
        weights = np.exp(row.astype(np.float64))
        assert draw.p_before == pytest.approx(weights[draw.token] / weights.sum(), rel=1e-6)
        assert fused.draw(row, SamplingParams(temperature=0), 0.9)[0] == top


def test_masked_tokens_are_never_drawn() -> None:
    fused = Fused(300)
    row = np.full(300, -math.inf, dtype=np.float32)
    row[[3, 200, 299]] = 0.0
    for params in (SamplingParams(min_p=0.0, temperature=T, em=EMInf()) for T in (0.5, 1.0, 2.0)):
        drawn = {fused.draw(row, params, u)[0] for u in np.linspace(0, 1, 101)[:-1]}
        assert drawn == {3, 200, 299}


def test_arguments_that_cannot_be_meant_raise() -> None:
    row, step, sampling = (
        np.zeros(4, dtype=np.float32),
        (1, 0.3, 10, 2.0, 0.0, 1.0),
        (1.0, 0.0, 1.0, 0, 1.0, 0.0, 0.5),
    )
    with pytest.raises(ValueError, match="scratch buffer"):
        _fused.draw(row, bytearray(10), *step, *sampling)
    scratch = bytearray(_fused.scratch_bytes(4))
    with pytest.raises(ValueError, match="between"):
        _fused.draw(row[:0], scratch, *step, *sampling)
    with pytest.raises(ValueError, match="contiguous"):
        _fused.draw(np.zeros((8, 8), dtype=np.float32)[:, 0], scratch, *step, *sampling)


def test_without_it_numpy_does_the_work_and_doctor_says_so(tmp_path: Path) -> None:
    """Tests the package as installed on a machine that cannot compile it."""
    package = Path(emlocal.__file__).parent
    compiled = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(package, tmp_path / "emlocal", ignore=compiled)
    code = (
        "import numpy as np, emlocal\n"
        "from emlocal.sampling import Sampler, SamplingParams\n"
        "from emlocal.diagnosis import sampler\n"
        "draw = Sampler(3).sample(np.float32([0, 9, 0]), SamplingParams(), 0.5)\n"
        "print(emlocal.__file__, sampler().status, draw.token)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    where, status, token = done.stdout.split()
    assert where.startswith(str(tmp_path))
    assert (status, token) == ("warn", "1")
