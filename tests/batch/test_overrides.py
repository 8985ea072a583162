"""What a line sets for itself: every setting, every value out of its range, every contradiction."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emlocal.batch.overrides import NAMES, Plan, fields_of, known_name, meant
from emlocal.errors import UsageError
from emlocal.settings import AdaptiveTemperature, EMInf, SamplingParams, settings_of

PLAN = Plan(SamplingParams(temperature=0.8), 100, ("END",), 3, 1)
EM_PLAN = replace(PLAN, params=replace(PLAN.params, em=EMInf(threshold=0.7)))
ADAPTIVE_PLAN = replace(PLAN, params=replace(PLAN.params, em=AdaptiveTemperature(ratio=0.9)))
HUGE = 10**400


def test_nothing_set_is_the_plan_itself() -> None:
    assert PLAN.with_overrides({}) == PLAN
    assert EM_PLAN.with_overrides(dict.fromkeys(NAMES)) == EM_PLAN  # null: not set


@pytest.mark.parametrize("name", sorted(settings_of(SamplingParams)))
def test_every_sampling_number_can_be_set_and_is_checked(name: str) -> None:
    known = settings_of(SamplingParams)[name]
    value = 2 if known.whole else 0.25
    for spelled in (name, name.replace("_", "-")):
        assert getattr(PLAN.with_overrides({spelled: value}).params, name) == value
    for wrong in (known.low - 1, known.high + 1, HUGE, -HUGE):
        with pytest.raises(UsageError, match=rf"^{name} is .*; it must be .*{known.low:g}"):
            PLAN.with_overrides({name: wrong})
    for wrong in ("1", True, [1], {}, "x" * 1000):
        with pytest.raises(UsageError, match=f"^{name} is .*; it must be a (whole )?number") as caught:
            PLAN.with_overrides({name: wrong})
        assert len(caught.value.message) < 200
    if known.whole:
        with pytest.raises(UsageError, match=rf"^{name} is 2\.5; it must be a whole number"):
            PLAN.with_overrides({name: 2.5})
    elif known.low_is_open:
        with pytest.raises(UsageError, match=f"^{name} is 0; it must be more than 0"):
            PLAN.with_overrides({name: 0})


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ({"em_inf": True}, EMInf()),
        ({"em_inf": True, "em_threshold": 0.5, "em_steps": 3}, EMInf(threshold=0.5, steps=3)),
        ({"em-inf": True, "em-learning-rate": 1}, EMInf(learning_rate=1.0)),
        (
            {"em_inf": True, "em_optimizer": "adam", "em_kl_weight": 0.1},
            EMInf(optimizer="adam", kl_weight=0.1),
        ),
        ({"em_preset": "paper"}, EMInf(steps=15, learning_rate=1.0)),
        ({"em_inf": True, "em_preset": "paper", "em_steps": 2}, EMInf(steps=2, learning_rate=1.0)),
        ({"adaptive_temp": True}, AdaptiveTemperature()),
        ({"adaptive_temp": True, "em_ratio": 1, "em_threshold": 0}, AdaptiveTemperature(1.0, 0.0)),
        ({"em_inf": False}, None),
        ({"adaptive_temp": False, "em_inf": True}, EMInf()),
    ],
)
def test_the_em_step(values: dict[str, Any], step: object) -> None:
    assert PLAN.with_overrides(values).params.em == step


def test_a_line_changes_the_step_that_is_there() -> None:
    assert EM_PLAN.with_overrides({"em_steps": 2}).params.em == EMInf(threshold=0.7, steps=2)
    assert EM_PLAN.with_overrides({"em_inf": True}).params.em == EMInf(threshold=0.7)
    assert EM_PLAN.with_overrides({"em_inf": False}).params.em is None
    assert EM_PLAN.with_overrides({"adaptive_temp": True}).params.em == AdaptiveTemperature()
    assert EM_PLAN.with_overrides({"adaptive_temp": False}).params.em == EMInf(threshold=0.7)
    assert ADAPTIVE_PLAN.with_overrides({"em_ratio": 0.2}).params.em == AdaptiveTemperature(ratio=0.2)
    assert ADAPTIVE_PLAN.with_overrides({"adaptive_temp": True}).params.em == AdaptiveTemperature(ratio=0.9)
    assert ADAPTIVE_PLAN.with_overrides({"adaptive_temp": False}).params.em is None
    assert ADAPTIVE_PLAN.with_overrides({"em_inf": True}).params.em == EMInf()


def test_a_preset_brings_its_sampling_along_unless_the_line_says_otherwise() -> None:
    found = PLAN.with_overrides({"em_preset": "em-pt"}).params
    assert (found.temperature, found.min_p, found.em) == (0.1, 0.0, EMInf(0.3, 3, 0.1, "adam", 0.05))
    assert PLAN.with_overrides({"em_preset": "em-pt", "temp": 0.6}).params.temperature == 0.6
    assert PLAN.with_overrides({"em_preset": "default"}).params.temperature == 0.8


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"em_inf": 1}, "em_inf is 1; it must be true or false"),
        ({"adaptive_temp": "yes"}, 'adaptive_temp is "yes"; it must be true or false'),
        ({"em_preset": "best"}, 'em_preset is "best"; it must be one of default, paper, em-pt'),
        ({"em_preset": ["paper"]}, 'em_preset is ["paper"]; it must be one of'),
        ({"em_preset": {}}, "em_preset is {}; it must be one of"),
        ({"em_inf": True, "adaptive_temp": True}, "contradict each other"),
        ({"em_preset": "paper", "adaptive_temp": True}, "contradict each other"),
        ({"em_preset": "paper", "em_inf": False}, "em_inf is false, and em_preset asks for it"),
        ({"em_steps": 3}, "em_steps does nothing here"),
        ({"em_optimizer": "adam"}, "em_optimizer does nothing here"),
        ({"em_inf": True, "em_ratio": 0.5}, "em_ratio does nothing here"),
        ({"adaptive_temp": True, "em_steps": 2}, "em_steps does nothing here"),
        ({"em_inf": True, "em_optimizer": "lbfgs"}, 'em_optimizer is "lbfgs"; it must be sgd or adam'),
        ({"em_inf": True, "em_optimizer": [1]}, "em_optimizer is [1]; it must be sgd or adam"),
        ({"em_inf": True, "em_threshold": -1}, "em_threshold is -1; it must be at least 0"),
        ({"em_inf": True, "em_steps": 1001}, "em_steps is 1001; it must be between 0 and 1000"),
        ({"em_inf": True, "em_steps": 1.5}, "em_steps is 1.5; it must be a whole number"),
        ({"em_inf": True, "em_learning_rate": 0}, "em_learning_rate is 0; it must be more than 0"),
        ({"em_inf": True, "em_learning_rate": HUGE}, "em_learning_rate is 1000"),
        ({"em_inf": True, "em_kl_weight": -0.1}, "em_kl_weight is -0.1; it must be between 0 and"),
        ({"adaptive_temp": True, "em_ratio": 1.1}, "em_ratio is 1.1; it must be between 0 and 1"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number at least 1"),
        ({"max_tokens": True}, "max_tokens is true; it must be a whole number at least 1"),
        ({"max_completion_tokens": "9"}, 'max_tokens is "9"; it must be a whole number at least 1'),
        ({"seed": -1}, "seed is -1; it must be a whole number between 0 and 18446744073709551615"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be"),
        ({"seed": 1.0}, "seed is 1.0; it must be a whole number"),
        ({"samples": 0}, "samples is 0; it must be a whole number between 1 and 1024"),
        ({"n": 1025}, "samples is 1025; it must be a whole number between 1 and 1024"),
        ({"stop": ""}, 'stop is ""; it must be a text or a list of texts, none of them empty'),
        ({"stop": ["a", ""]}, 'stop is ["a", ""]; it must be'),
        ({"stop": [1]}, "stop is [1]; it must be"),
        ({"stop": {"a": 1}}, 'stop is {"a": 1}; it must be'),
        ({"logit_bias": [[1, 2]]}, "logit_bias is [[1, 2]]; it must be an object of token ids and numbers"),
        ({"logit_bias": {"cat": 1}}, 'logit_bias names "cat"; it must be a token id'),
        ({"logit_bias": {"-1": 1}}, 'logit_bias names "-1"; it must be a token id'),
        ({"logit_bias": {"9" * 5000: 1}}, 'logit_bias names "999'),
        ({"logit_bias": {"5": "1"}}, 'logit_bias of token 5 is "1"; it must be a number'),
        ({"logit_bias": {"5": True}}, "logit_bias of token 5 is true; it must be a number"),
        ({"logit_bias": {"5": 1e300}}, "logit_bias of token 5 is 1e+300; it must be a number between"),
        ({"logit_bias": {"5": HUGE}}, "logit_bias of token 5 is 1000"),
        ({"temp": 1, "temperature": 0.5}, "temp and temperature are the same setting"),
        ({"top-k": 1, "top_k": 1}, "top-k and top_k are the same setting"),
    ],
)
def test_what_cannot_be_meant(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        PLAN.with_overrides(values)
    assert says in caught.value.message
    assert len(caught.value.message) < 200


def test_the_other_settings() -> None:
    found = PLAN.with_overrides(
        {"max_tokens": 5, "stop": "a", "seed": 2**64 - 1, "n": 3, "logit_bias": {"7": -100, "8": 0.5}}
    )
    assert found == Plan(replace(PLAN.params, logit_bias=((7, -100.0), (8, 0.5))), 5, ("a",), 2**64 - 1, 3)
    assert PLAN.with_overrides({"stop": []}).stop == ()
    assert PLAN.with_overrides({"temp": 1, "temperature": None}).params.temperature == 1


def test_names() -> None:
    assert known_name("top-p")
    assert not known_name("topp")
    assert meant("topp") == "top_p"
    assert meant("em-treshold") == "em_threshold"
    assert meant("question") is None
    assert fields_of({"temp": 1, "top-k": 2, "n": None}) == {"temperature", "top_k"}


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers() | st.just(HUGE),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=3),
    st.lists(st.integers() | st.text(max_size=2), max_size=3),
    st.dictionaries(st.text(max_size=3) | st.integers(0, 400).map(str), st.integers() | st.floats(-9, 9)),
    st.sampled_from(["paper", "sgd"]),
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(NAMES)), VALUES, max_size=4))
def test_any_values_make_a_plan_or_an_error_that_people_can_read(values: dict[str, Any]) -> None:
    for plan in (PLAN, EM_PLAN, ADAPTIVE_PLAN):
        said = ""
        try:
            found = plan.with_overrides(values)
        except UsageError as error:
            said = error.message
        else:
            assert found.samples >= 1
            assert found.max_tokens >= 1
        assert not re.search("--[a-z]{2}", said)  # a line has no flags
