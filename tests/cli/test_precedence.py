"""Where settings come from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from emlocal.cli import precedence
from emlocal.cli.options import EMOptions, EngineOptions, Preset, SamplingOptions
from emlocal.cli.precedence import Config
from emlocal.errors import UsageError
from emlocal.settings import AdaptiveTemperature, EMInf, SamplingParams
from tests.cli.conftest import Outcome


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Config]:
    monkeypatch.setenv("EMLOCAL_CONFIG_DIR", str(tmp_path))

    def write(text: str) -> Config:
        (tmp_path / "config.toml").write_text(text)
        return precedence.read_config()

    return write


def test_flag_then_preset_then_config_then_model_then_default(config: Callable[[str], Config]) -> None:
    file = config("temp = 0.5\ntop-k = 7\n")
    model = {"temperature": 0.6, "top_k": 20.0, "top_p": 0.9}
    got = precedence.sampling(SamplingOptions(top_k=3), EMOptions(), file, model)
    assert (got.params.temperature, got.params.top_k, got.params.top_p) == (0.5, 3, 0.9)
    assert got.params.min_p == SamplingParams().min_p
    assert (got.sources["temperature"], got.sources["top_k"]) == ("config", "flag")
    assert (got.sources["top_p"], got.sources["min_p"]) == ("model", "default")
    preset = precedence.sampling(SamplingOptions(), EMOptions(em_preset=Preset.em_pt), file, model)
    assert (preset.params.temperature, preset.sources["temperature"]) == (0.1, "preset")


def test_names_of_the_gguf_are_understood() -> None:
    model = {"penalty_repeat": 1.1, "top_k": -1.0, "penalty_last_n": 32.0, "mirostat": 2}
    params = precedence.sampling(SamplingOptions(), EMOptions(), Config(), model).params
    assert params.repeat_penalty == 1.1
    assert params.top_k == 0
    assert params.repeat_last_n == 32


def test_no_config_file_is_an_empty_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMLOCAL_CONFIG_DIR", str(tmp_path / "none"))
    assert precedence.read_config() == Config()


def test_every_kind_of_value_in_the_config_file(config: Callable[[str], Config]) -> None:
    file = config(
        'model = "m"\nthreads = 2\noffline = true\ntemp = 1\nstop = ["a", "b"]\nkv-type = "q8_0"\n'
        'em-inf = true\nem-optimizer = "adam"\nseed = 0\n'
    )
    assert (file.engine.model, file.engine.threads, file.engine.offline) == ("m", 2, True)
    assert isinstance(file.sampling.temperature, float)
    assert (file.sampling.stop, file.sampling.seed) == (["a", "b"], 0)
    step = precedence.em_step(EMOptions(), file.em)
    assert isinstance(step, EMInf)
    assert step.optimizer == "adam"
    assert precedence.seed(SamplingOptions(), file.sampling) == 0
    assert precedence.merged(EngineOptions(threads=1), file.engine).threads == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("temp = 'hot'", "temp is 'hot'"),
        ("temprature = 1", "did you mean temp"),
        ("top-k = 1.5", "top-k is 1.5"),
        ("em-inf = 1", "em-inf is 1"),
        ("threads = true", "threads is True"),
        ("kv-type = 'q3'", "f32, f16"),
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
    file = EMOptions(em_inf=True, em_steps=4)
    assert precedence.em_step(EMOptions(), file) == EMInf(steps=4)
    assert precedence.em_step(EMOptions(em_inf=False), file) is None
    assert precedence.em_step(EMOptions(em_steps=6), file) == EMInf(steps=6)
    adaptive = precedence.em_step(EMOptions(adaptive_temperature=True, em_ratio=0.4), file)
    assert adaptive == AdaptiveTemperature(ratio=0.4)
    assert precedence.em_step(EMOptions(em_preset=Preset.paper, em_steps=5)) == EMInf(
        threshold=0.3, steps=5, learning_rate=1.0
    )


def test_logit_bias_in_both_spellings() -> None:
    flags = SamplingOptions(logit_bias=["3=-inf", "4+1.5", "5-2"])
    params = precedence.sampling(flags, EMOptions(), Config(), {}).params
    assert params.logit_bias == ((3, float("-inf")), (4, 1.5), (5, -2.0))


def test_the_config_file_reaches_the_command_line(
    emlocal: Callable[..., Outcome], tiny: str, tmp_path: Path
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text(f"model = '{tiny}'\nmax-tokens = 3\ntemp = 0\n")
    done = emlocal("generate", "hello")
    assert done.code == 0
    assert "cut off at --max-tokens 3" in done.err
