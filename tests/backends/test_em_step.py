"""A new EM step is one file: it runs on every engine by its reference, without a kernel."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from emlocal.backends.base import Backend, Row
from emlocal.em import EMStep, Outcome, describe_em
from emlocal.em.entropy import checked, entropy, log_softmax
from emlocal.em.steps import STEPS, AdaptiveTemperature, EMInf
from emlocal.sampling import Draw, SamplingParams, Uniforms
from emlocal.sampling.draw import adjust, inverse_cdf, probabilities
from emlocal.settings import check_settings, setting
from tests.backends.contract import read, tokens


@dataclass(frozen=True)
class Halve(EMStep):
    """A toy step that doubles all logits of rows above a threshold, which halves the temperature."""

    name: ClassVar[str] = "halve"
    flag: ClassVar[str] = "--halve"
    help: ClassVar[str] = "Halve the temperature of unsure tokens."

    threshold: float = setting(0.5, "--em-threshold", 0, 100, "Leave rows below this entropy alone (nats).")

    def __post_init__(self) -> None:
        check_settings(self)

    def describe(self) -> str:
        return f"halved above {self.threshold:g}"

    def reference(self, z: NDArray[np.float64]) -> Outcome:
        before = float(entropy(z))
        if before <= self.threshold:
            return Outcome(z, before, before, 0)
        return Outcome(2 * z, before, float(entropy(2 * z)), 1)


def by_hand(row: NDArray[np.float32], params: SamplingParams, u: float) -> Draw:
    """Runs the whole pipeline in its plainest form."""
    assert params.em is not None
    z = checked(row)
    done = params.em.reference(z)
    token = inverse_cdf(probabilities(done.logits, params), u)
    before, after = (float(np.exp(log_softmax(logits)[token])) for logits in (z, done.logits))
    plain = inverse_cdf(probabilities(z, params), u)
    return Draw(token, done.entropy_before, done.entropy_after, done.steps, before, after, plain)


def test_a_new_step_draws_what_its_reference_says(backend: Backend) -> None:
    sequence, uniforms = read(backend, tokens(backend)), Uniforms(5)
    row, seen = backend.logits(sequence), tokens(backend)
    settings = (
        SamplingParams(em=Halve(), temperature=1.0, min_p=0.0),
        SamplingParams(em=Halve(0.0), temperature=0.8, top_k=40, top_p=0.9, repeat_penalty=1.3),
        SamplingParams(em=Halve(100.0)),
    )
    for params in settings:
        drawn = backend.sample([Row(sequence, params, uniforms[t], seen) for t in range(4)])
        expected = [by_hand(adjust(row, params, seen), params, uniforms[t]) for t in range(4)]
        assert drawn == expected
    moved = [by_hand(row, params, 0.5).steps for params in settings]
    assert moved == [1, 1, 0]


def test_beside_steps_that_have_a_kernel_rows_keep_their_order(backend: Backend) -> None:
    sequence, uniforms = read(backend, tokens(backend)), Uniforms(6)
    steps = (Halve(), None, EMInf(), Halve(0.1), AdaptiveTemperature(), EMInf(), Halve())
    rows = [Row(sequence, SamplingParams(em=em), uniforms[t]) for t, em in enumerate(steps)]
    assert backend.sample(rows) == [backend.sample([row])[0] for row in rows]


@dataclass(frozen=True)
class Plain(EMInf):
    """EM-INF without kernels, which are chosen by the exact type; so its reference runs."""


def test_kernels_are_not_for_what_derives_from_their_step(backend: Backend) -> None:
    sequence = read(backend, tokens(backend))
    row = backend.logits(sequence)
    settings = [SamplingParams(em=cls(0.1, 3, 1.0), temperature=1.0, min_p=0.0) for cls in (EMInf, Plain)]
    fast, exact = (backend.sample([Row(sequence, params, 0.4)])[0] for params in settings)
    assert exact == by_hand(row, settings[1], 0.4)
    assert exact.entropy_after == pytest.approx(fast.entropy_after, abs=1e-4)


def test_the_table_names_each_step() -> None:
    assert {name: (step.flag, step.field()) for name, step in STEPS.items()} == {
        "em-inf": ("--em-inf", "em_inf"),
        "adaptive-temperature": ("--adaptive-temp", "adaptive_temp"),
    }
    described = [describe_em(step) for step in (None, Halve(), EMInf(kl_weight=0.1), AdaptiveTemperature())]
    assert described == [
        "off",
        "halved above 0.5",
        "δ 0.3, ≤ 10 steps of 2 (sgd, κ 0.1)",
        "adaptive temperature, α 0.5, δ 0.1",
    ]
