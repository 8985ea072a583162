"""The syntax of --methods, and the settings that result."""

import pytest

from emlocal.errors import UsageError
from emlocal.evaluation.contenders import describe, read_contenders
from emlocal.settings import EM_PRESETS, AdaptiveTemperature, EMInf, Plan, SamplingParams

BASE = Plan(SamplingParams(temperature=0.7, top_p=0.9, repeat_penalty=1.1), 64, (), 3, 1)


def plan(name: str, chosen: frozenset[str] = frozenset()) -> Plan:
    (contender,) = read_contenders(name)
    return contender.plan(BASE, chosen)


def test_sampling_is_the_settings_at_hand() -> None:
    assert plan("sample") == BASE


def test_a_temperature_is_the_plain_distribution() -> None:
    params = plan("sample:1").params
    assert params == SamplingParams(temperature=1, min_p=0)
    assert plan("sample:temperature=1").params == SamplingParams(temperature=1, top_p=0.9, repeat_penalty=1.1)


def test_methods_have_their_settings() -> None:
    assert plan("greedy").params.temperature == 0
    assert (plan("min-p").params.min_p, plan("min-p").params.temperature) == (0.1, 1.0)
    assert plan("min-p:0.2").params.min_p == 0.2
    assert plan("em-inf").params.em == EMInf()
    assert plan("em-inf").params.temperature == 0.7
    for preset, (step, settings) in EM_PRESETS.items():
        params = plan(f"em-inf:{preset}").params
        assert params.em == step
        assert settings.items() <= vars(params).items()
    assert plan("adaptive-temperature:0.4").params.em == AdaptiveTemperature(ratio=0.4)
    assert plan("dynamic-temperature:0.3").params.dynatemp_range == 0.3


def test_single_settings_come_last() -> None:
    step = plan("em-inf:paper:em_steps=5:em-threshold=0.2:temperature=0.5")
    assert step.params.em == EMInf(threshold=0.2, steps=5, learning_rate=1.0)
    assert step.params.temperature == 0.5
    assert plan("em-inf:em_optimizer=adam").params.em == EMInf(optimizer="adam")


def test_one_part_draws_and_one_collects() -> None:
    (voting,) = read_contenders("em-inf:paper+self-consistency:4")
    found = voting.plan(BASE, frozenset())
    assert (found.samples, found.params.em) == (4, EM_PRESETS["paper"][0])
    assert voting.method.name == "self-consistency"
    (refined,) = read_contenders("sequential-refinement:3")
    assert refined.method.identity()["rounds"] == 3
    assert refined.plan(BASE, frozenset()).samples == 1
    (plain,) = read_contenders("self-consistency")
    assert plain.plan(BASE, frozenset()).samples == 8


def test_flags_are_for_those_that_sample() -> None:
    chosen = frozenset({"temperature"})
    assert plan("greedy", chosen).params.temperature == 0
    assert plan("min-p", chosen).params.temperature == 0.7
    assert plan("em-inf", chosen).params.temperature == 0.7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no method"),
        (" , ", "names no method"),
        ("greedy,greedy", "twice"),
        ("beam", "a method is one of"),
        ("greedy:0.5", "is not a setting"),
        ("sample:0.5:0.6", "is not a setting"),
        ("em-inf:papers", "the presets are"),
        ("em-inf:em_step=3", "no setting 'em_step'"),
        ("sample:seed=9", "which --seed sets"),
        ("sample:samples=3", "--samples the answers"),
        ("sample:top_k=3:top-k=4", "sets top_k twice"),
        ("self-consistency:x", "one number is expected"),
        ("self-consistency:4:5", "one number is expected"),
        ("self-consistency:1", "at least 2"),
        ("greedy+sample", "exclude each other"),
        ("self-consistency:2+sequential-refinement", "exclude each other"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_contenders(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sample:-1", "between 0 and 100"),
        ("sample:warm", "must be a number"),
        ("em-inf:em_ratio=0.5", "has no effect without adaptive_temp"),
        ("greedy+self-consistency:3", "all alike"),
        ("greedy+think-em:3", "cannot choose"),
    ],
)
def test_what_cannot_be_meant_is_said(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(text)


def test_settings_in_words() -> None:
    words = {}
    for text in ("greedy", "sample:1", "em-inf+self-consistency:3", "sequential-refinement:2"):
        (contender,) = read_contenders(text)
        words[text] = describe(contender, contender.plan(BASE, frozenset()), BASE)
    assert words["greedy"].startswith("the most probable token")
    assert words["sample:1"] == "T 1"
    assert "EM δ 0.3" in words["em-inf+self-consistency:3"]
    assert words["em-inf+self-consistency:3"].endswith("majority of 3")
    assert words["sequential-refinement:2"].endswith("2 revisions")
    (steps,) = read_contenders("think-em:3:think_choice=random")
    ours = describe(steps, steps.plan(BASE, frozenset()), BASE)
    assert ours.startswith("T 0.8, min-p 0.05")
    assert ours.endswith("4 steps, a random one of 3, then greedy")
    (short,) = read_contenders("sample:1:max_tokens=4")
    assert describe(short, short.plan(BASE, frozenset()), BASE) == "T 1, at most 4 tokens"
