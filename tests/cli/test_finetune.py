"""`emlocal finetune` on a tiny model: torch trains it, llama.cpp or torch answers."""

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emlocal.cli.training_view import View
from emlocal.models.adapters.reading import read_adapter
from emlocal.models.resolve import LocalModel, resolve
from emlocal.models.unpacked import unpack
from tests.cli.conftest import Outcome
from tests.tiny_pair import ModelPair, write_pair

Emlocal = Callable[..., Outcome]
ROW = re.compile(r" +(\d+)/(\d+) +\d+\.\d{4} +(\d\.\d{4})? .*%.*\d\.\d$")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return write_pair(tmp_path_factory.mktemp("pair"), "llama")


@pytest.fixture(scope="module")
def folder(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face folder with its tokenizer."""
    model = resolve(str(pair.gguf))
    assert isinstance(model, LocalModel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return unpack(model)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": f"say {i}"}) + "\n" for i in range(6)))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def finetune(emlocal: Emlocal, pair: ModelPair, data: Path, out: Path) -> Callable[..., Outcome]:
    """A small run; later flags win over those here."""

    def go(*arguments: str, model: Path = pair.gguf, data: Path = data) -> Outcome:
        small = ["--steps", "2", "--prompts-per-step", "2", "--max-tokens", "8", "--rank", "4"]
        small += ["--threads", "1", "--dtype", "float32"]
        return emlocal("finetune", "-m", str(model), "--data", str(data), "-o", str(out), *small, *arguments)

    return go


Finetune = Callable[..., Outcome]


def error_of(outcome: Outcome) -> str:
    """The one line that says what was wrong."""
    (line,) = (line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert "Traceback" not in outcome.err
    return line


def settings_in(out: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((out / "run.json").read_text())["settings"]
    return settings


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", ["llama.cpp", "torch", "folder"])
def test_a_run_to_the_end_and_its_adapter_on_both_engines(
    finetune: Finetune, emlocal: Emlocal, pair: ModelPair, folder: Path, out: Path, how: str
) -> None:
    strong = ("--steps", "4", "--learning-rate", "0.03", "--max-length-change", "100")
    more = {"model": folder} if how == "folder" else {}
    done = finetune(*strong, "--rollouts", "auto" if how == "folder" else how, **more)
    assert done.code == 0
    assert done.out == ""
    lines = done.err.splitlines()
    assert any(f"answers by {'torch' if how == 'folder' else how}, 2 at once, 1 thread" in x for x in lines)
    assert any(", trained on torch, cpu, float32 (" in x for x in lines)
    assert any("learning rate 0.03, β 1.5, rank 4, seed 0" in x for x in lines)
    rows = [match for match in map(ROW.fullmatch, lines) if match]
    assert [match[1] for match in rows] == ["0", "1", "2", "3", "4"]
    assert [match[3] is None for match in rows] == [False] * 4 + [True]
    assert [row["step"] for row in metrics(out)] == list(range(5))
    model = folder if how == "folder" else pair.gguf
    assert lines[-1] == f"  emlocal chat -m {model} --adapter {out}"

    greedy = ("--temp", "0", "--max-tokens", "12", "-q", "say 1")
    base = emlocal("generate", "-m", str(pair.gguf), *greedy)
    llama = emlocal("generate", "-m", str(pair.gguf), "--adapter", str(out), *greedy)
    torch = emlocal("generate", "-m", str(model), "--backend", "torch", "--adapter", str(out), *greedy)
    assert llama.code == torch.code == 0
    assert llama.out == torch.out
    assert llama.out != base.out


def test_a_folder_cannot_be_answered_by_llama_cpp(finetune: Finetune, folder: Path, out: Path) -> None:
    done = finetune("--rollouts", "llama.cpp", model=folder)
    assert done.code == 2
    assert "is no GGUF model: llama.cpp cannot answer with it" in error_of(done)
    assert not out.exists()


def test_quiet_says_nothing(finetune: Finetune, out: Path) -> None:
    done = finetune("-q")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (out / "adapter_model.safetensors").exists()


def test_a_path_with_spaces_is_quoted_in_the_command_to_try(
    finetune: Finetune, pair: ModelPair, tmp_path: Path
) -> None:
    model = tmp_path / "my model.gguf"
    model.write_bytes(pair.gguf.read_bytes())
    done = finetune(model=model)
    assert "my model.gguf, trained on torch" in done.err.splitlines()[2]
    assert str(tmp_path) not in done.err.splitlines()[2]
    assert done.err.splitlines()[-1].startswith(f"  emlocal chat -m '{model}' --adapter ")


def test_dry_run_tells_and_writes_nothing(finetune: Finetune, out: Path, tmp_path: Path) -> None:
    before = {p.name for p in tmp_path.iterdir()}
    done = finetune("--dry-run", "--learning-rate", "0.000001", "--alpha", "100", "--limit", "5")
    assert done.code == 0
    assert not out.exists()
    assert {p.name for p in tmp_path.iterdir()} - before <= {"cache"}  # the unpacked model
    values = dict(re.findall(r"^  (--[\w-]+|prompts|memory|2 steps) +(.+)$", done.out, re.MULTILINE))
    assert values["--learning-rate"] == "0.000001"
    assert values["--alpha"] == "100"
    assert values["--target-modules"].startswith("q_proj,k_proj")
    assert values["prompts"] == "5 of 5"
    assert values["memory"].endswith("with one whole micro-batch")
    assert values["2 steps"] == "0 s"
    assert not re.search(r"\de[+-]\d", done.out)
    masked = done.out[done.out.index("not in the loss") : done.out.index("in the loss (8 tokens")]
    assert "say " in masked


def test_a_run_that_is_there_needs_resume_and_ends_at_once_with_it(finetune: Finetune, out: Path) -> None:
    assert finetune().code == 0
    weights = (out / "adapter_model.safetensors").read_bytes()
    again = finetune()
    assert again.code == 2
    assert "holds a run already" in error_of(again)
    assert "--resume" in again.err
    resumed = finetune("--resume")
    assert resumed.code == 0
    assert "going on after step 2" in resumed.err
    assert len(list(filter(ROW.fullmatch, resumed.err.splitlines()))) == 1
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--learning-rate", "0.5"], "learning_rate was 0.0001, is 0.5"),
        (["--steps", "3", "--seed", "1"], "steps was 2, is 3; seed was 0, is 1"),
        (["--limit", "5"], "prompts count was 6, is 5"),
        (["--system", "be brief"], "prompts sha256 was"),
        (["--rollouts", "torch"], 'engines rollouts was "llama.cpp", is "torch"'),
        (["--context", "100"], "engines context was 256, is 100"),
        (["--parallel", "1"], "engines parallel was 2, is 1"),
    ],
)
def test_resume_with_other_settings_names_what_differs(
    finetune: Finetune, out: Path, changes: list[str], says: str
) -> None:
    assert finetune().code == 0
    done = finetune("--resume", *changes)
    assert done.code == 2
    assert says in error_of(done)


def test_resume_with_as_many_other_prompts_is_refused(finetune: Finetune, out: Path, data: Path) -> None:
    assert finetune().code == 0
    data.write_text(data.read_text().replace("say 3", "say 7"))
    assert "prompts sha256 was" in error_of(finetune("--resume"))


def test_resume_where_nothing_is_begins_and_says_so(finetune: Finetune, out: Path) -> None:
    done = finetune("--resume")
    assert done.code == 0
    assert "holds no run to go on with: beginning a new one" in done.err


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
        ("learning_rate = 1e-4", "there is no setting 'learning_rate'", "did you mean learning-rate"),
        ("temp = 1", "there is no setting 'temp'", "loss-temp"),
        ("steps = 2.5", "steps is 2.5; it must be a whole number", ""),
        ("steps = true", "steps is True; it must be a whole number", ""),
        ('seed = "7"', "seed is '7'; it must be a whole number", ""),
        ('normalize = "sum"', "normalize is 'sum'; it must be one of token, sequence", ""),
        ("target-modules = []", "--target-modules is empty", ""),
        ("target-modules = [1]", "target-modules is [1]; it must be a list of names", ""),
        ("kl-beta = -1", "--kl-beta is -1; it must be between 0 and 1000", ""),
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


def test_validate_shows_and_keeps_both_accuracies(finetune: Finetune, out: Path, tmp_path: Path) -> None:
    file = tmp_path / "validation.jsonl"
    lines = [{"question": f"1+{i}=", "answer": f"so it is\n#### {i + 1}"} for i in range(3)]
    long = {"question": "a" * 400, "answer": "1"}
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, long]))
    done = finetune("--validate", str(file))
    assert done.code == 0
    assert re.search(r"accuracy on the validation prompts: \d+\.\d% → \d+\.\d%", done.err)
    assert "1 prompt of 4 does not fit: validation.jsonl, line 4" in done.err
    kept = json.loads((out / "validation.json").read_text())
    assert kept["prompts"] == 3
    assert 0 <= kept["before"] <= 1
    (out / "validation.json").write_text(json.dumps({**kept, "before": 0.125}))
    assert "12.5% → " in finetune("--resume", "--validate", str(file)).err  # known: not measured again
    file.write_text(json.dumps(lines[0]))
    assert "12.5% → " not in finetune("--resume", "--validate", str(file)).err


def test_validate_without_answers(finetune: Finetune, out: Path, data: Path) -> None:
    done = finetune("--validate", str(data))
    assert done.code == 2
    assert "prompts.jsonl, line 1: no answer to compare with" in error_of(done)
    assert not out.exists()


@pytest.mark.parametrize("tracker", ["trackio", "wandb", "tensorboard"])
def test_report_to_a_package_that_is_missing(
    finetune: Finetune, out: Path, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (tracker, f"{tracker}.summary"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    done = finetune("--report-to", tracker)
    assert done.code == 1
    assert f"--report-to {tracker} needs its package" in error_of(done)
    assert f"pip install {tracker}" in done.err
    assert not out.exists()


def test_report_to_tensorboard(finetune: Finetune, out: Path) -> None:
    assert finetune("--report-to", "tensorboard").code == 0
    (events,) = (out / "tensorboard").iterdir()
    assert b"gradient_norm" in events.read_bytes()


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
        (["--max-tokens", "256"], "--max-tokens is 256; the context of prompt and answer is 256"),
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


def test_a_collapse_is_exit_1_with_the_adapter_of_before(finetune: Finetune, out: Path) -> None:
    flags = ("--steps", "40", "--learning-rate", "0.05", "--kl-beta", "0", "--entropy-floor", "4.5")
    done = finetune(*flags, "--max-length-change", "1000", "--max-repetition", "1", "--max-kl", "0")
    assert done.code == 1
    assert "stopped: the answers' entropy is" in done.err
    assert "below --entropy-floor 4.5" in done.err
    assert done.err.splitlines()[-1].startswith("  emlocal chat -m ")
    rows = metrics(out)
    kept = int(re.findall(r"the adapter of (\d+) step", done.err)[-1])
    assert rows[kept]["entropy"] >= 4.5 > rows[-1]["entropy"]
    assert read_adapter(out).pairs


def test_prompts_that_do_not_fit_are_counted_or_all_that_there_is(
    finetune: Finetune, out: Path, data: Path
) -> None:
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "a" * 300}) + "\n" + json.dumps({"prompt": "b" * 400}) + "\n")
    done = finetune()
    assert done.code == 0
    assert "2 prompts of 8 do not fit: prompts.jsonl, line 7 has" in done.err
    assert "--context 256 less 8 for the answer leave 248; left out" in done.err
    assert json.loads((out / "run.json").read_text())["prompts"]["count"] == 6
    data.write_text(json.dumps({"prompt": "a" * 300}))
    all_of_them = finetune("--resume")
    assert all_of_them.code == 1
    assert "1 prompt of 1 does not fit" in error_of(all_of_them)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_an_output_that_is_something_else_is_left_alone(
    finetune: Finetune, out: Path, make: Callable[[Path], None]
) -> None:
    make(out)
    if out.is_dir():
        (out / "thesis.tex").write_text("years of work")
    done = finetune()
    assert done.code == 2
    assert "holds something else: thesis.tex" in done.err or f"{out} is no folder" in done.err
    assert not out.is_dir() or [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_an_output_that_cannot_be_written(emlocal: Emlocal, pair: ModelPair, data: Path) -> None:
    done = emlocal(
        *("finetune", "-m", str(pair.gguf), "--data", str(data), "-o", "/proc/nowhere/out"),
        *("--threads", "1", "--dtype", "float32", "--max-tokens", "8"),
    )
    assert done.code == 1
    assert "cannot write /proc/nowhere/out" in error_of(done)


@pytest.mark.parametrize("rollouts", ["llama.cpp", "torch"])
@pytest.mark.parametrize("stop_at", [0, 2])
def test_ctrl_c_and_resume_give_the_weights_of_a_run_in_one_go(
    finetune: Finetune, out: Path, monkeypatch: pytest.MonkeyPatch, rollouts: str, stop_at: int
) -> None:
    flags = ("--rollouts", rollouts, "--steps", "4", "--learning-rate", "0.01", "--save-every", "100")
    flags += ("--max-length-change", "100", "--tokens-per-batch", "40")
    assert finetune(*flags).code == 0
    weights, rows = (out / "adapter_model.safetensors").read_bytes(), metrics(out)
    shutil.rmtree(out)

    real = View.finished_step

    def finished_step(self: View, row: dict[str, Any]) -> None:
        real(self, row)
        if row["step"] == stop_at:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(View, "finished_step", finished_step)
        stopped = finetune(*flags)
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == f"stopped; the same command with --resume goes on ({out})"
    assert (out / "adapter_model.safetensors").read_bytes() != weights
    resumed = finetune(*flags, "--resume")
    assert resumed.code == 0
    assert f"going on after step {stop_at + 1}" in resumed.err
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    timeless = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in r] for r in (rows, metrics(out))
    ]
    assert timeless[0] == timeless[1]


def test_a_smaller_token_budget_is_heeded_on_resume_and_said(finetune: Finetune) -> None:
    assert finetune().code == 0
    done = finetune("--resume", "--tokens-per-batch", "30")
    assert done.code == 0
    assert "going on with micro-batches of 30 tokens instead of 2,048" in done.err
    assert "micro-batches" not in finetune("--resume", "--tokens-per-batch", "4096").err
