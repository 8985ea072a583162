"""The vLLM plugin's kernels against emlocal's reference: same logits, same rows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from emlocal_vllm import request as fields
from emlocal_vllm.draw import choose, only, signed, uniforms
from emlocal_vllm.request import Request, read
from emlocal_vllm.steps import HEAD, REACH, Settings, sharpen
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from emlocal.em import EMStep
from emlocal.em.steps import AdaptiveTemperature, EMInf
from emlocal.em.steps.em_inf import EM_PRESETS
from emlocal.sampling.draw import Uniforms, inverse_cdf, probabilities, request_key
from emlocal.settings import SamplingParams
from emlocal.settings.em import em_numbers
from tests.integrations.requests import asked_of, extra_of

CONTRACT = 1e-5
STEPS: dict[str, EMStep] = {
    "default": EMInf(),
    "paper": EM_PRESETS["paper"][0],
    "em-pt": EM_PRESETS["em-pt"][0],
    "kl": EMInf(kl_weight=0.05),
    "adam": EMInf(optimizer="adam", steps=5, learning_rate=0.1),
    "long": EMInf(steps=40, learning_rate=2.0),
    "to the end": EMInf(threshold=0.0, steps=16),
    "adaptive": AdaptiveTemperature(),
    "cold": AdaptiveTemperature(ratio=0.05, threshold=0.0),
}
Rows = NDArray[np.float32]


def sharpened(rows: Rows, step: EMStep, *, ask: bool) -> tuple[Rows, Any]:
    asked = read(asked_of(extra_of(step)))
    z = torch.from_numpy(rows.copy())
    found = sharpen(z, columns([asked] * len(rows)), asked.kernel, asked.steps, ask)
    return z.numpy(), found


def columns(requests: list[Request]) -> Settings:
    table = [[r.threshold, r.steps, r.learning_rate, r.kl_weight, r.ratio] for r in requests]
    return Settings(*torch.tensor(table, dtype=torch.float64).T[..., None])


def softmax(z: Any) -> NDArray[np.float64]:
    weights = np.exp(np.float64(z) - np.float64(z).max(-1, keepdims=True))
    p: NDArray[np.float64] = weights / weights.sum(-1, keepdims=True)
    return p


def check(rows: Rows, step: EMStep, *, ask: bool) -> None:
    new, found = sharpened(rows, step, ask=ask)
    exact = step.apply(rows)
    distance = np.abs(softmax(new) - softmax(exact.logits)).sum(-1) / 2
    assert distance.max() <= CONTRACT
    np.testing.assert_allclose(found.before[:, 0], exact.entropy_before, atol=2e-5)
    np.testing.assert_allclose(found.after[:, 0], exact.entropy_after, atol=1e-4)
    np.testing.assert_array_equal(found.steps[:, 0], exact.steps)
    np.testing.assert_array_equal(np.isneginf(new), np.isneginf(rows))
    np.testing.assert_array_equal(new[exact.steps == 0], rows[exact.steps == 0])


@pytest.mark.parametrize("ask", [True, False], ids=["cpu", "device"])
@pytest.mark.parametrize("name", STEPS)
def test_real_rows(recorded: Rows, name: str, ask: bool) -> None:
    masked = recorded.copy()
    masked[:, ::3] = -np.inf
    check(np.concatenate([recorded, masked]), STEPS[name], ask=ask)


SHAPES: dict[str, Callable[[np.random.Generator, int], NDArray[np.float64]]] = {
    "normal": lambda random, V: random.normal(size=V),
    "heavy": lambda random, V: random.standard_t(3, size=V),
    "few": lambda random, V: np.where(np.arange(V) < 700, 0.0, -3.0) + random.normal(size=V) / 10,
    "a wide head over a flat tail": lambda random, V: (
        np.where(np.arange(V) < 2000, 6.0, 0.0) + random.normal(size=V) / 100
    ),
    "ties": lambda random, V: np.round(random.normal(size=V) * 2) / 2,
    "zipf": lambda random, V: -np.log(1.0 + np.arange(V)) + random.normal(size=V) / 20,
}


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    scale=st.floats(0.05, 8),
    seed=st.integers(0, 2**32 - 1),
    V=st.sampled_from([7, HEAD, 5000, 20000]),
    name=st.sampled_from(sorted(STEPS)),
    ask=st.booleans(),
)
def test_made_up_rows(shape: str, scale: float, seed: int, V: int, name: str, ask: bool) -> None:
    random = np.random.default_rng(seed)
    rows = np.stack([SHAPES[shape](random, V) * scale + 20 for _ in range(2)]).astype(np.float32)
    check(rows, STEPS[name], ask=ask)


def test_the_quick_way_is_for_settings_within_reach() -> None:
    assert read(asked_of({"em_inf": 1, "em_steps": 16})).kernel == "sgd"
    assert read(asked_of({"em_inf": 1, "em_steps": 17})).kernel == "full"
    assert EMInf().steps * EMInf().learning_rate <= REACH


class NoLooking(TorchDispatchMode):
    """Refuses operations that bring values to the host, or whose shape depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in {
            "_local_scalar_dense",
            "nonzero",
            "item",
            "unique",
            "masked_select",
        }
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", STEPS)
def test_on_a_device_nothing_waits_for_values(name: str) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 3000)).astype(np.float32)
    with NoLooking():
        sharpened(rows, STEPS[name], ask=False)
        z = torch.from_numpy(rows)
        one = torch.ones((3, 1), dtype=torch.float64)
        only(z, choose(z, one / 2, one, one * 40, one * 0.9, one * 0.05, ordered=True))
    with pytest.raises(AssertionError), NoLooking():
        sharpened(rows, STEPS[name], ask=True)


def test_a_rows_result_depends_on_its_neighbours_by_rounding_alone(smollm2_rows: Rows) -> None:
    for step in STEPS.values():
        together, found = sharpened(smollm2_rows, step, ask=True)
        alone, own = sharpened(smollm2_rows[2:3], step, ask=True)
        assert np.abs(softmax(alone[0]) - softmax(together[2])).sum() / 2 <= 1e-7
        assert own.steps[0] == found.steps[2]


@given(
    st.integers(0, 2**64 - 1),
    st.text(min_size=1, max_size=5),
    st.integers(0, 1023),
    st.integers(0, 2**31 - 1),
)
def test_uniforms_are_emlocals(seed: int, name: str, sample: int, token: int) -> None:
    key = fields.request_key(name)
    assert key == request_key(name)
    columns = [torch.tensor([signed(n), signed(n)]) for n in (seed, key, sample)]
    found = uniforms(*columns, torch.tensor([token, 5]))
    expected = Uniforms(seed, key, sample)
    assert found.tolist() == [expected[token], expected[5]]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 5, 40, 10**6]),
    st.sampled_from([0.1, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05, 1.0]),
)
def test_the_draw_is_emlocals(seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    random = np.random.default_rng(seed)
    rows = (np.round(random.normal(size=(4, 300)) * 16) / 4).astype(np.float32)
    rows[:, 7] = -np.inf
    u = random.random(4)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = [
        inverse_cdf(probabilities(np.float64(row), params), each) for row, each in zip(rows, u, strict=True)
    ]
    numbers = [torch.full((4, 1), float(each)).double() for each in (temperature, top_k, top_p, min_p)]
    z = torch.from_numpy(rows)
    token = choose(z, torch.from_numpy(u)[:, None], *numbers, ordered=top_k > 0 or top_p < 1)
    assert token[:, 0].tolist() == expected
    assert only(z, token).argmax(-1).tolist() == expected


def test_the_fields_are_emlocals() -> None:
    for step, own in ((EMInf, fields.EM_INF), (AdaptiveTemperature, fields.ADAPTIVE)):
        theirs = em_numbers(step)
        numbers = {name: known for name, known in theirs.items() if known.kind in ("number", "whole")}
        assert numbers.keys() == own.keys()
        for name, known in numbers.items():
            number = own[name]
            assert (number.default, number.low, number.high) == (known.default, known.low, known.high)
            assert (number.whole, number.low_is_open) == (known.whole, known.low_is_open)
            assert number.span() == known.span()
    assert em_numbers(EMInf)["em_optimizer"].choices == fields.OPTIMIZERS
    assert fields.PRESETS.keys() == EM_PRESETS.keys()
    for name, (preset, _) in EM_PRESETS.items():
        assert read(asked_of({"em_preset": name})) == read(asked_of(extra_of(preset)))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"em_inf": 1, "em_steps": 2000}, "em_steps is 2000; it must be between 0 and 1000"),
        ({"em_inf": 1, "em_steps": 1.5}, "a whole number between 0 and 1000"),
        ({"em_inf": 1, "em_learning_rate": 0}, "more than 0 and at most 1e.06"),
        ({"em_inf": 1, "em_threshold": "0.3"}, "a number at least 0 nats"),
        ({"em_inf": 1, "em_threshold": float("nan")}, "a number at least 0 nats"),
        ({"em_inf": 1, "em_treshold": 1}, "no field em_treshold; did you mean em_threshold"),
        ({"em_steps": 3}, "em_steps has no effect without em_inf"),
        ({"em_inf": 1, "adaptive_temp": 1}, "only one EM step"),
        ({"em_inf": 2}, "it must be 1 or 0"),
        ({"em_preset": "best"}, "one of default, paper, em-pt"),
        ({"em_preset": "paper", "em_inf": 0}, "contradict each other"),
        ({"em_draw": 1, "em_seed": -3}, "a whole number between 0 and 2\\^64 - 1"),
        ({"em_draw": 1, "em_id": 3}, "it must be a text"),
    ],
)
def test_a_field_out_of_range_is_refused(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(asked_of(extra))


def test_other_fields_are_not_ours_and_samples_have_numbers() -> None:
    assert not read(asked_of({"somebody": "else's"})).wanted
    assert not read(asked_of({"em_inf": 0})).wanted
    child = read(replace(asked_of({"em_draw": 1, "em_seed": 7, "em_id": "q1"}), seed=9))
    assert (child.seed, child.sample, child.key) == (7, 2, request_key("q1"))
    lone = read(asked_of({"em_draw": 1, "em_seed": 7}))
    assert (lone.seed, lone.sample) == (7, 0)
    with pytest.raises(ValueError, match="em_draw with n 4 needs a seed"):
        read(replace(asked_of({"em_draw": 1, "em_seed": 7}), n=4))


def test_penalties_are_refused_where_they_come_after_the_step() -> None:
    with pytest.raises(ValueError, match=r"presence_penalty is 0\.5"):
        fields.refuse_penalties(replace(asked_of({"em_inf": 1}), presence_penalty=0.5))
    fields.refuse_penalties(replace(asked_of({}), presence_penalty=0.5))
