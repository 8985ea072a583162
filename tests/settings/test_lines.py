"""Settings of a single line: every setting, every value out of range, every contradiction."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.errors import UsageError
from emlocal.settings import AdaptiveTemperature, EMInf, Plan, SamplingParams, overridden, settings_of
from emlocal.settings.resolve import LINE, names_in
from tests.examples import examples

PLAN = Plan(SamplingParams(temperature=0.8), 100, ("END",), 3, 1)
EM_PLAN = replace(PLAN, params=replace(PLAN.params, em=EMInf(threshold=0.7)))
ADAPTIVE_PLAN = replace(PLAN, params=replace(PLAN.params, em=AdaptiveTemperature(ratio=0.9)))
HUGE = 10**400
SPELLINGS = sorted({s.removeprefix("--") for k in LINE.settings.values() for s in (*k.flags, k.name)})


def test_nothing_set_is_the_plan_itself() -> None:
    assert overridden(PLAN, {}) == PLAN
    assert overridden(EM_PLAN, dict.fromkeys(SPELLINGS)) == EM_PLAN  # null means not set


@pytest.mark.parametrize("name", sorted(settings_of(SamplingParams)))
def test_every_sampling_number_can_be_set_and_is_checked(name: str) -> None:
    known = settings_of(SamplingParams)[name]
    value = 2 if known.whole else 0.25
    for spelled in (name, name.replace("_", "-")):
        assert getattr(overridden(PLAN, {spelled: value}).params, name) == value
    for wrong in (known.low - 1, known.high + 1, HUGE, -HUGE):
        with pytest.raises(UsageError, match=rf"^{name} is .*; it must be .*{known.low:g}"):
            overridden(PLAN, {name: wrong})
    for wrong in ("1", True, [1], {}, "x" * 1000):
        with pytest.raises(UsageError, match=f"^{name} is .*; it must be a (whole )?number") as caught:
            overridden(PLAN, {name: wrong})
        assert len(caught.value.message) < 200
    if known.whole:
        with pytest.raises(UsageError, match=rf"^{name} is 2\.5; it must be a whole number"):
            overridden(PLAN, {name: 2.5})
    elif known.low_is_open:
        with pytest.raises(UsageError, match=f"^{name} is 0; it must be more than 0"):
            overridden(PLAN, {name: 0})


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
    assert overridden(PLAN, values).params.em == step


def test_a_line_changes_the_step_that_is_there() -> None:
    assert overridden(EM_PLAN, {"em_steps": 2}).params.em == EMInf(threshold=0.7, steps=2)
    assert overridden(EM_PLAN, {"em_inf": True}).params.em == EMInf(threshold=0.7)
    assert overridden(EM_PLAN, {"em_inf": False}).params.em is None
    assert overridden(EM_PLAN, {"adaptive_temp": True}).params.em == AdaptiveTemperature()
    assert overridden(EM_PLAN, {"adaptive_temp": False}).params.em == EMInf(threshold=0.7)
    assert overridden(ADAPTIVE_PLAN, {"em_ratio": 0.2}).params.em == AdaptiveTemperature(ratio=0.2)
    assert overridden(ADAPTIVE_PLAN, {"adaptive_temp": True}).params.em == AdaptiveTemperature(ratio=0.9)
    assert overridden(ADAPTIVE_PLAN, {"adaptive_temp": False}).params.em is None
    assert overridden(ADAPTIVE_PLAN, {"em_inf": True}).params.em == EMInf()


def test_a_preset_brings_its_sampling_along_unless_the_line_says_otherwise() -> None:
    found = overridden(PLAN, {"em_preset": "em-pt"}).params
    assert (found.temperature, found.min_p, found.em) == (0.1, 0.0, EMInf(0.3, 3, 0.1, "adam", 0.05))
    assert overridden(PLAN, {"em_preset": "em-pt", "temp": 0.6}).params.temperature == 0.6
    assert overridden(PLAN, {"em_preset": "default"}).params.temperature == 0.8


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
        ({"em_preset": "paper", "em_inf": False}, "em_inf false and em_preset contradict each other"),
        ({"em_steps": 3}, "em_steps has no effect without em_inf"),
        ({"em_optimizer": "adam"}, "em_optimizer has no effect without em_inf"),
        ({"em_inf": True, "em_ratio": 0.5}, "em_ratio has no effect without adaptive_temp"),
        ({"adaptive_temp": True, "em_steps": 2}, "em_steps has no effect without em_inf"),
        ({"em_inf": True, "em_optimizer": "lbfgs"}, 'em_optimizer is "lbfgs"; it must be sgd or adam'),
        ({"em_inf": True, "em_optimizer": [1]}, "em_optimizer is [1]; it must be sgd or adam"),
        ({"em_inf": True, "em_threshold": -1}, "em_threshold is -1; it must be at least 0"),
        ({"em_inf": True, "em_steps": 1001}, "em_steps is 1001; it must be between 0 and 1000"),
        ({"em_inf": True, "em_steps": 1.5}, "em_steps is 1.5; it must be a whole number"),
        ({"em_inf": True, "em_learning_rate": 0}, "em_learning_rate is 0; it must be more than 0"),
        ({"em_inf": True, "em_learning_rate": HUGE}, "em_learning_rate is 1000"),
        ({"em_inf": True, "em_kl_weight": -0.1}, "em_kl_weight is -0.1; it must be between 0 and"),
        ({"adaptive_temp": True, "em_ratio": 1.1}, "em_ratio is 1.1; it must be between 0 and 1"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": True}, "max_tokens is true; it must be a whole number at least 1"),
        ({"max_completion_tokens": "9"}, 'max_tokens is "9"; it must be a whole number at least 1'),
        ({"seed": -1}, "seed is -1; it must be between 0 and 2^64 - 1"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must be"),
        ({"seed": 1.0}, "seed is 1.0; it must be a whole number"),
        ({"samples": 0}, "samples is 0; it must be between 1 and 1024"),
        ({"n": 1025}, "samples is 1025; it must be between 1 and 1024"),
        ({"stop": ""}, 'stop is ""; it must be a text or a list of texts that are not empty'),
        ({"stop": ["a", ""]}, 'stop is ["a", ""]; it must be'),
        ({"stop": [1]}, "stop is [1]; it must be"),
        ({"stop": {"a": 1}}, 'stop is {"a": 1}; it must be'),
        ({"logit_bias": [[1, 2]]}, "logit_bias is [[1, 2]]; it must be an object from token ids to numbers"),
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
        overridden(PLAN, values)
    assert says in caught.value.message
    assert len(caught.value.message) < 200


def test_the_other_settings() -> None:
    found = overridden(
        PLAN, {"max_tokens": 5, "stop": "a", "seed": 2**64 - 1, "n": 3, "logit_bias": {"7": -100, "8": 0.5}}
    )
    assert found == Plan(replace(PLAN.params, logit_bias=((7, -100.0), (8, 0.5))), 5, ("a",), 2**64 - 1, 3)
    assert overridden(PLAN, {"stop": []}).stop == ()
    assert overridden(PLAN, {"temp": 1, "temperature": None}).params.temperature == 1


def test_names() -> None:
    assert LINE.find("top-p") is LINE.settings["top_p"]
    assert LINE.find("topp") is None
    assert LINE.meant("topp") is LINE.settings["top_p"]
    assert LINE.meant("em-treshold") is LINE.settings["em_threshold"]
    for lenient in ("question", "predict", "prediction", "context", "m"):
        assert LINE.meant(lenient) is None
    assert names_in({"temp": 1, "top-k": 2, "n": None}) == {"temperature", "top_k"}


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


@examples(400)
@given(st.dictionaries(st.sampled_from(SPELLINGS), VALUES, max_size=4))
def test_any_values_make_a_plan_or_an_error_that_people_can_read(values: dict[str, Any]) -> None:
    for plan in (PLAN, EM_PLAN, ADAPTIVE_PLAN):
        said = ""
        try:
            found = overridden(plan, values)
        except UsageError as error:
            said = error.message
        else:
            assert found.samples >= 1
            assert found.max_tokens >= 1
        assert not re.search("--[a-z]{2}", said)  # a line has no flags
