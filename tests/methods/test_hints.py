"""Settings without effect are said, and only those."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.backends.base import ModelInfo
from emlocal.backends.fake import FakeBackend
from emlocal.em import EMStep
from emlocal.em.steps import AdaptiveTemperature, EMInf
from emlocal.em.steps.power import Power
from emlocal.methods.hints import without_effect
from emlocal.settings import EM_PRESETS, Plan, SamplingParams

PLAIN = replace(FakeBackend().info, name="small", chat_template="{{ messages[0].content }}")
THINKING = replace(PLAIN, chat_template="{{ messages[0].content }}<think></think> {{ reasoning_effort }}")
GREEDY = SamplingParams(temperature=0, em=EMInf())


@pytest.mark.parametrize(
    ("plan", "info", "said"),
    [
        (Plan(), PLAIN, []),
        (Plan(GREEDY), PLAIN, ["with --temp 0, EM (δ 0.3, ≤ 10 steps of 2 (sgd)) changes no answer"]),
        (Plan(replace(GREEDY, em=AdaptiveTemperature())), PLAIN, ["with --temp 0, EM (adaptive temperature"]),
        (Plan(replace(GREEDY, em=EM_PRESETS["em-pt"][0])), PLAIN, []),
        (Plan(replace(GREEDY, temperature=0.1)), PLAIN, []),
        (Plan(replace(GREEDY, dynatemp_range=0.5)), PLAIN, []),
        (Plan(think_budget=9), PLAIN, ["small writes no thoughts, so --think-budget does nothing"]),
        (Plan(think_budget=9), THINKING, []),
        (Plan(em_where="thought"), PLAIN, []),
        (
            Plan(SamplingParams(em=EMInf()), em_where="thought"),
            PLAIN,
            ["small writes no thoughts, so --em-where thought switches EM off"],
        ),
        (
            Plan(SamplingParams(em=EMInf()), em_where="answer", think_budget=9),
            PLAIN,
            [
                "small writes no thoughts, so --think-budget does nothing",
                "small writes no thoughts, so --em-where answer does nothing",
            ],
        ),
        (Plan(SamplingParams(em=EMInf()), em_where="thought"), THINKING, []),
        (
            Plan(reasoning_effort="low"),
            PLAIN,
            ["the chat template of small does not read --reasoning-effort"],
        ),
        (Plan(reasoning_effort="low"), THINKING, []),
    ],
)
def test_settings_without_effect(plan: Plan, info: ModelInfo, said: list[str]) -> None:
    found = without_effect(plan, info)
    assert len(found) == len(said)
    assert all(text.startswith(begin) for text, begin in zip(found, said, strict=True))


def test_raw_prompts_have_no_thoughts() -> None:
    plan = Plan(SamplingParams(em=EMInf()), em_where="thought", think_budget=3)
    why = "a raw prompt is not searched for thoughts"
    assert without_effect(plan, THINKING, raw=True) == [
        f"{why}, so --think-budget does nothing",
        f"{why}, so --em-where thought does nothing",
    ]


def test_thoughts_cannot_be_hidden_where_there_are_none() -> None:
    assert without_effect(Plan(), PLAIN, hides=True) == [
        "small writes no thoughts, so --hide-thinking does nothing"
    ]
    assert without_effect(Plan(), THINKING, hides=True) == []


ROWS = st.lists(st.floats(-8, 8), min_size=2, max_size=24)
STEPS = st.one_of(
    st.builds(
        EMInf,
        threshold=st.floats(0, 1),
        steps=st.integers(0, 30),
        learning_rate=st.floats(0.01, 100),
    ),
    st.builds(AdaptiveTemperature, ratio=st.floats(0, 1), threshold=st.floats(0, 1)),
    st.builds(Power, alpha=st.floats(1, 100)),
)


@given(ROWS, STEPS)
def test_these_steps_keep_the_most_probable_token(row: list[float], step: EMStep) -> None:
    assert step.keeps_most_probable
    z = np.array(row)
    after = step.reference(z).logits
    assert after[z.argmax()] >= after.max() - 1e-9 * (1 + abs(after.max()))


@pytest.mark.parametrize("step", [EMInf(kl_weight=5), EMInf(optimizer="adam")])
def test_adam_and_the_kl_term_can_change_the_most_probable_token(step: EMInf) -> None:
    assert not step.keeps_most_probable
    rng = np.random.default_rng(0)
    rows = [rng.normal(0, scale, 24) for scale in (0.01, 0.5, 2.0) for _ in range(200)]
    assert any(step.reference(z).logits.argmax() != z.argmax() for z in rows)
