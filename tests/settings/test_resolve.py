"""The sources of settings."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from emlocal.errors import UsageError
from emlocal.settings import (
    EM_PRESETS,
    AdaptiveTemperature,
    EMInf,
    EMStep,
    Plan,
    SamplingParams,
    resolve_settings,
)
from emlocal.settings.options import EngineOptions
from emlocal.settings.resolve import GENERATION, random_seed, read_config
from emlocal.settings.table import FLAGS, options_of
from tests.cli.conftest import Outcome, emlocal, tiny

__all__ = ["emlocal", "tiny"]
Config = dict[str, Any]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Config]:
    monkeypatch.setenv("EMLOCAL_CONFIG_DIR", str(tmp_path))

    def write(text: str) -> Config:
        (tmp_path / "config.toml").write_text(text)
        return read_config()

    return write


def em_step(flags: Mapping[str, Any], config: Mapping[str, Any] = {}) -> EMStep | None:
    return resolve_settings(("flag", flags), ("config", config)).params.em


def test_flag_then_preset_then_config_then_model_then_default(config: Callable[[str], Config]) -> None:
    file = config("temp = 0.5\ntop-k = 7\nmax-tokens = 9\n")
    model = {"temperature": 0.6, "top_k": 20.0, "top_p": 0.9}
    got = resolve_settings(("flag", {"top_k": 3}), ("config", file)).with_model(model)
    assert (got.params.temperature, got.params.top_k, got.params.top_p) == (0.5, 3, 0.9)
    assert got.params.min_p == SamplingParams().min_p
    assert got.plan.max_tokens == 9
    assert (got.sources["temperature"], got.sources["top_k"]) == ("config", "flag")
    assert (got.sources["top_p"], got.sources["min_p"]) == ("model", "default")
    assert (got.sources["max_tokens"], got.sources["seed"]) == ("config", "default")
    assert got.chosen == {"temperature", "top_k", "max_tokens"}
    preset = resolve_settings(("flag", {"em_preset": "em-pt"}), ("config", file)).with_model(model)
    assert (preset.params.temperature, preset.sources["temperature"]) == (0.1, "preset")
    assert preset.chosen == {"em_preset", "max_tokens"}


def test_a_preset_is_stronger_than_the_config_file_and_weaker_than_flags() -> None:
    file = {"em_steps": 4, "em_threshold": 0.9}
    got = resolve_settings(("flag", {"em_preset": "paper", "em_threshold": 0.2}), ("config", file))
    assert got.params.em == EMInf(threshold=0.2, steps=15, learning_rate=1.0)
    assert (got.sources["em_threshold"], got.sources["em_steps"]) == ("flag", "preset")


def test_a_preset_in_the_config_file_sets_the_step_alone() -> None:
    got = resolve_settings(("flag", {}), ("config", {"em_preset": "em-pt", "em_steps": 4}))
    step = EM_PRESETS["em-pt"][0]
    assert isinstance(step, EMInf)
    assert got.params == SamplingParams(em=EMInf(0.3, 4, step.learning_rate, "adam", step.kl_weight))
    assert (got.sources["em_steps"], got.sources["em_kl_weight"]) == ("config", "preset")


def test_names_of_the_gguf_are_understood() -> None:
    model = {"penalty_repeat": 1.1, "top_k": -1.0, "penalty_last_n": 32.0, "mirostat": 2}
    params = resolve_settings().with_model(model).params
    assert params.repeat_penalty == 1.1
    assert params.top_k == 0
    assert params.repeat_last_n == 32


def test_a_bad_value_of_the_model_says_so_unless_something_stronger_is_there() -> None:
    with pytest.raises(UsageError, match="the model's own settings: --temp is -3; it must be between"):
        resolve_settings().with_model({"temperature": -3.0})
    assert resolve_settings(("flag", {"temperature": 1.0})).with_model({"temperature": -3.0}).chosen
    for wrong in (float("inf"), float("nan"), 1e300):
        with pytest.raises(UsageError, match="the model's own settings: --top-k is"):
            resolve_settings().with_model({"top_k": wrong})
    assert resolve_settings().with_model({"logit_bias": 1.0}) == resolve_settings()


def test_no_config_file_is_an_empty_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMLOCAL_CONFIG_DIR", str(tmp_path / "none"))
    assert read_config() == {}


def test_every_kind_of_value_in_the_config_file(config: Callable[[str], Config]) -> None:
    file = config(
        'model = "m"\nthreads = 2\noffline = true\ntemp = 1\nstop = ["a", "b"]\nkv-type = "q8_0"\n'
        'em-inf = true\nem-optimizer = "adam"\nseed = 0\nadapter = "x"\nlogit-bias = "3=-inf"\n'
    )
    engine = options_of(EngineOptions, ("flag", {"threads": 1}), ("config", file))
    assert engine == EngineOptions("m", adapter=("x",), threads=1, kv_type="q8_0", offline=True)
    plan = resolve_settings(("flag", {}), ("config", file), base=Plan(seed=random_seed())).plan
    assert isinstance(plan.params.temperature, float)
    assert (plan.stop, plan.seed) == (("a", "b"), 0)
    assert plan.params.logit_bias == ((3, float("-inf")),)
    assert plan.params.em == EMInf(optimizer="adam")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("temp = 'hot'", 'temp is "hot"'),
        ("temprature = 1", "did you mean temp"),
        ("top-k = 1.5", "top-k is 1.5"),
        ("top-k = -1", "top-k is -1; it must be between 0 and"),
        ("em-inf = 1", "em-inf is 1"),
        ("threads = true", "threads is true"),
        ("kv-type = 'q3'", "f32, f16"),
        ("temp = 1\ntemperature = 1", "temp and temperature are the same setting"),
        ("em-inf = true\nadaptive-temp = true", "em-inf and adaptive-temp contradict each other"),
        ("samples = 3", "there is no setting 'samples'"),
        ("= 1", "cannot be read"),
    ],
)
def test_errors_in_the_config_file_name_it(config: Callable[[str], Config], text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        config(text)
    error = caught.value.message + caught.value.hint
    assert says in error
    assert "config.toml" in error


def test_flags_choose_the_step_over_the_config_file() -> None:
    file = {"em_inf": True, "em_steps": 4}
    assert em_step({}, file) == EMInf(steps=4)
    assert em_step({"em_inf": False}, file) is None
    assert em_step({"adaptive_temp": False}, file) == EMInf(steps=4)
    assert em_step({"em_steps": 6}, file) == EMInf(steps=6)
    assert em_step({"adaptive_temp": True, "em_ratio": 0.4}, file) == AdaptiveTemperature(ratio=0.4)
    assert em_step({"em_inf": True}, {"adaptive_temp": True, "em_ratio": 0.1}) == EMInf()
    assert em_step({"em_preset": "paper", "em_steps": 5}) == EMInf(threshold=0.3, steps=5, learning_rate=1.0)
    assert em_step({"adaptive_temp": True}, {"em_preset": "paper"}) == AdaptiveTemperature()
    assert em_step({}, {"em_steps": 4}) is None  # a number in the file waits for its step


def test_logit_bias_in_both_spellings() -> None:
    flags = GENERATION.read({"logit_bias": ["3=-inf", "4+1.5", "5-2"]}, FLAGS)
    params = resolve_settings(("flag", flags)).params
    assert params.logit_bias == ((3, float("-inf")), (4, 1.5), (5, -2.0))


def test_the_config_file_reaches_the_command_line(
    emlocal: Callable[..., Outcome], tiny: str, tmp_path: Path
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text(f"model = '{tiny}'\nmax-tokens = 3\ntemp = 0\n")
    done = emlocal("generate", "hello")
    assert done.code == 0
    assert "cut off at --max-tokens 3" in done.err
