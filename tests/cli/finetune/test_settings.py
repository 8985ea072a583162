"""Flags, config file and recipes of `emlocal finetune`."""

import re
from pathlib import Path

import pytest

from emlocal.models.adapters import read_adapter
from tests.cli.finetune.runs import Emlocal, Finetune
from tests.cli.training import error_of, settings_in
from tests.metrics import metrics
from tests.tiny_pair import ModelPair


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_config_flag_then_file_then_recipe_then_default(
    finetune: Finetune, out: Path, tmp_path: Path, dry: list[str]
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'steps = 5\nlearning-rate = 0.002\nloss-temp = 2\ntarget-modules = ["q_proj", "v_proj"]\n'
        'schedule = "cosine"\n'
    )
    done = finetune("--config", str(config), "--recipe", "paper", *dry)
    assert done.code == 0
    if dry:
        assert "--target-modules      q_proj,v_proj\n" in done.out
        return
    settings = settings_in(out)
    assert settings["steps"] == 2  # flag over file
    assert settings["learning_rate"] == 0.002  # file over recipe
    assert settings["temperature"] == 2
    assert settings["schedule"] == "cosine"
    assert settings["target_modules"] == ["q_proj", "v_proj"]
    assert (settings["kl_beta"], settings["normalize"]) == (0, "sequence")  # recipe over default
    assert settings["max_kl"] == 1  # default
    assert len(read_adapter(out).pairs) == 4


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("learning_rat = 1e-4", "there is no setting 'learning_rat'", "did you mean learning-rate"),
        ("steps = 2\niters = 3", "steps and iters are the same setting", "give only one of them"),
        ("temp = 1", "there is no setting 'temp'", "loss-temp"),
        ("steps = 2.5", "steps is 2.5; it must be a whole number", ""),
        ("steps = true", "steps is true; it must be a whole number", ""),
        ('seed = "7"', 'seed is "7"; it must be a whole number', ""),
        ('normalize = "sum"', 'normalize is "sum"; it must be token or sequence', ""),
        ("target-modules = []", "target-modules is empty", ""),
        ("target-modules = [1]", "target-modules is [1]; it must be a list of names", ""),
        ("kl-beta = -1", "run.toml: kl-beta is -1; it must be between 0 and 1000", ""),
        ("steps = ", "cannot be read", ""),
        ("[training]\nsteps = 3", "there is no setting 'training'", ""),
    ],
)
def test_config_that_cannot_be_meant(
    finetune: Finetune, out: Path, tmp_path: Path, text: str, says: str, hint: str
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(text)
    done = finetune("--config", str(config))
    assert done.code == 2
    assert says in error_of(done)
    assert hint in done.err
    assert not out.exists()


def test_config_missing_or_a_folder(finetune: Finetune, tmp_path: Path) -> None:
    assert "there is no file" in error_of(finetune("--config", str(tmp_path / "none.toml")))
    assert "Is a directory" in error_of(finetune("--config", str(tmp_path)))


def test_recipes(finetune: Finetune, out: Path, emlocal: Emlocal, pair: ModelPair, data: Path) -> None:
    for recipe, wanted in {
        "default": {"--steps": "12", "--prompts-per-step": "16", "--kl-beta": "1.5", "--loss-temp": "1"},
        "paper": {"--steps": "40", "--prompts-per-step": "512", "--kl-beta": "0", "--normalize": "sequence"},
        "one-shot": {"--steps": "10", "--prompts-per-step": "64", "--kl-beta": "0", "--loss-temp": "0.5"},
    }.items():
        done = emlocal(
            *("finetune", "-m", str(pair.gguf), "--data", str(data), "-o", str(out), "--recipe", recipe),
            *("--dry-run", "--max-tokens", "8", "--limit", "1", "--threads", "1", "--dtype", "float32"),
        )
        assert done.code == 0
        values = dict(re.findall(r"^  (--[\w-]+) +(.+)$", done.out, re.MULTILINE))
        assert wanted.items() <= values.items()


def test_one_shot_takes_one_prompt(finetune: Finetune, out: Path) -> None:
    several = finetune("--recipe", "one-shot")
    assert several.code == 2
    assert "one-shot trains on one prompt" in error_of(several)
    assert "--limit 1" in several.err
    one = finetune("--recipe", "one-shot", "--limit", "1")
    assert one.code == 0
    assert all(row["answers"] == 2 for row in metrics(out))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "--steps is 0; it must be between 1 and 1e+06"),
        (["--prompts-per-step", "0"], "--prompts-per-step is 0"),
        (["--learning-rate", "0"], "--learning-rate is 0; it must be more than 0 and at most 1"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--weight-decay", "2"], "--weight-decay is 2; it must be between 0 and 1"),
        (["--max-grad-norm", "0"], "--max-grad-norm is 0; it must be more than 0"),
        (["--kl-beta", "-0.1"], "--kl-beta is -0.1; it must be between 0 and 1000"),
        (["--loss-temp", "0"], "--loss-temp is 0; it must be more than 0 and at most 100"),
        (["--rollout-temp", "0"], "--rollout-temp is 0"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--rank", "0"], "--rank is 0; it must be between 1 and 1024"),
        (["--alpha", "0"], "--alpha is 0"),
        (["--target-modules", " , "], "--target-modules is empty"),
        (["--entropy-floor", "-1"], "--entropy-floor is -1"),
        (["--max-repetition", "2"], "--max-repetition is 2; it must be between 0 and 1"),
        (["--max-length-change", "0.5"], "--max-length-change is 0.5; it must be at least 1"),
        (["--max-kl", "-1"], "--max-kl is -1; it must be at least 0"),
        (["--save-every", "0"], "--save-every is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--parallel", "0"], "--parallel is 0; it must be between 1 and 256"),
        (["--threads", "0"], "--threads is 0"),
        (["--context", "3"], "--context is 3"),
        (["--tokens-per-batch", "0"], "--tokens-per-batch is 0"),
        (["--config", "/no/such.toml"], "there is no file /no/such.toml"),
        (["--validate", "/no/such.jsonl"], "there is no file /no/such.jsonl"),
    ],
)
def test_bad_values_are_one_line_with_flag_and_range(
    finetune: Finetune, out: Path, arguments: list[str], says: str
) -> None:
    done = finetune(*arguments)
    assert done.code == 2
    assert says in error_of(done)
    assert done.out == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--context", "1000"], "--context is 1,000; the model was trained on 256"),
        (["--max-tokens", "256"], "--max-tokens is 256, but prompt and answer must fit 256"),
        (["--device", "tpu"], "tpu"),
        (["--device", "cuda:99"], "there is no device cuda:99"),
        (["--target-modules", "q_proj,nope"], "no linear layer called nope"),
    ],
)
def test_values_that_do_not_fit_the_model(
    finetune: Finetune, out: Path, arguments: list[str], says: str
) -> None:
    done = finetune(*arguments)
    assert done.code == 2
    assert says in error_of(done)
    assert not out.exists()


@pytest.mark.parametrize(
    "flag", ["--recipe", "--normalize", "--schedule", "--rollouts", "--dtype", "--report-to"]
)
def test_choices_that_there_are_not(finetune: Finetune, flag: str) -> None:
    done = finetune(flag, "nonsense")
    assert done.code == 2
    assert flag in done.err
    assert "nonsense" in done.err
