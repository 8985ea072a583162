"""`emlocal rl` on a tiny model: torch trains it, llama.cpp or torch answers."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emlocal.cli.training_view import TerminalView
from emlocal.models.adapters import read_adapter
from emlocal.settings import records_of
from emlocal.training import rl_settings
from emlocal.training.rl_settings import RLSettings, recipes
from tests.cli.conftest import Outcome
from tests.cli.training import error_of, settings_in
from tests.metrics import metrics, timeless
from tests.tiny_pair import ModelPair

Emlocal = Callable[..., Outcome]
RL = Callable[..., Outcome]
ROW = re.compile(r" +(\d+)/(\d+) +(-?\d+\.\d{3})? +(\d+%)? +\d\.\d{4} +(\d\.\d{4})? .*%.*\d\.\d$")
SMALL = ("--threads", "1", "--dtype", "float32")
FREE = ("--max-length-change", "1000", "--max-repetition", "1", "--max-kl", "0", "--entropy-floor", "0")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [{"question": f"say {i}", "answer": f"it is\n#### {i}"} for i in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "say 0", "answer": "0"}) + '\n{"question": "say 1"}\n')
    return path


@pytest.fixture
def rl(emlocal: Emlocal, pair: ModelPair, data: Path, out: Path) -> RL:
    """A small run; later flags win over those here."""

    def go(*arguments: str, model: Path = pair.gguf, data: Path = data) -> Outcome:
        small = ["--steps", "2", "--prompts-per-step", "2", "--samples", "2", "--max-tokens", "8"]
        small += ["--rank", "4", *SMALL]
        return emlocal("rl", "-m", str(model), "--data", str(data), "-o", str(out), *small, *arguments)

    return go


def told(text: str) -> dict[str, str]:
    """Returns the settings that `--dry-run` shows."""
    return dict(re.findall(r"^  (--[\w-]+|prompts|engine) +(.+)$", text, re.MULTILINE))


# -------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("how", ["llama.cpp", "torch", "folder"])
def test_a_run_to_the_end_and_its_adapter_on_both_engines(
    rl: RL, emlocal: Emlocal, pair: ModelPair, folder: Path, out: Path, how: str
) -> None:
    strong = ("--steps", "4", "--learning-rate", "0.05", "--samples", "3", *FREE)
    more = {"model": folder} if how == "folder" else {}
    done = rl(*strong, "--rollouts", "auto" if how == "folder" else how, **more)
    assert (done.code, done.out) == (0, "")
    lines = done.err.splitlines()
    assert any(f"answers by {'torch' if how == 'folder' else how}, 6 at once, 1 thread" in x for x in lines)
    assert "recipe default: 4 steps of 3 answers to each of 2 of 6 prompts," in lines
    assert "reward token, advantage rloo, loss reinforce, β 0.001," in lines
    rows = [match for match in map(ROW.fullmatch, lines) if match]
    assert [match[1] for match in rows] == ["0", "1", "2", "3", "4"]
    assert [match[3] is None for match in rows] == [False] * 4 + [True]  # the last answers have no reward
    for match, row in zip(rows, metrics(out)[:4], strict=False):
        assert float(match[3]) == pytest.approx(row["reward"], abs=1e-3)
        assert match[4] == f"{row['zero_variance']:.0%}"
        assert row["answers"] == 6
        assert row["reward"] < 0
    assert lines[-1] == f"  emlocal chat -m {folder if how == 'folder' else pair.gguf} --adapter {out}"
    assert json.loads((out / "run.json").read_text())["format"] == "emlocal-rl-1"

    model = str(folder if how == "folder" else pair.gguf)
    greedy = ("--temp", "0", "--max-tokens", "12", "-q", "say 1")
    base = emlocal("generate", "-m", str(pair.gguf), *greedy)
    llama = emlocal("generate", "-m", str(pair.gguf), "--adapter", str(out), *greedy)
    torch = emlocal("generate", "-m", model, "--backend", "torch", "--adapter", str(out), *greedy)
    assert llama.code == torch.code == 0
    assert llama.out == torch.out
    assert llama.out != base.out


def test_quiet_says_nothing(rl: RL, out: Path) -> None:
    done = rl("-q")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (out / "adapter_model.safetensors").exists()


def test_a_long_run_says_so_and_is_the_same(
    rl: RL, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--loss", "ppo-clip", "--ppo-epochs", "2")
    assert "may take up to" not in rl(*more).err
    monkeypatch.setattr("emlocal.training.forecast.NEVER_LONG", 0)
    monkeypatch.setattr("emlocal.text.LONG", 0.0)
    said = rl(*more, "-o", str(tmp_path / "told")).err
    assert re.search(r"^this run may take up to .*: 2 steps, 8 answers of up to 8 tokens each$", said, re.M)
    assert "to shorten it, lower --steps, --prompts-per-step, --samples or --max-tokens" in said
    weights = "adapter_model.safetensors"
    assert (tmp_path / "told" / weights).read_bytes() == (out / weights).read_bytes()


def test_several_rewards_and_all_that_holds_back(rl: RL, out: Path) -> None:
    done = rl(
        *("--reward", " token=0.1, verifier=2 ,vote=-1", "--loss", "ppo-clip", "--ppo-epochs", "3"),
        *("--regularize", "kl-cov", "--token-weights", "tw-grpo", "--entropy-bonus", "-0.5"),
        *("--samples", "3", "--gradient-checkpointing"),
    )
    assert done.code == 0
    assert "reward 0.1 · token + 2 · verifier - 1 · vote, advantage rloo, loss ppo-clip, β 0.001," in done.err
    for row in metrics(out)[:-1]:
        of_each = {name: row[f"reward_{name}"] for name in ("token", "verifier", "vote")}
        total = 0.1 * of_each["token"] + 2 * of_each["verifier"] - of_each["vote"]
        assert row["reward"] == pytest.approx(total, abs=1e-5)
        assert row["clipped"] == 0  # KL-Cov does not clip
        assert row["policy_entropy"] > 0
        assert row["gradient_norm"] > 0
    settings = settings_in(out)
    assert settings["reward"] == [["token", 0.1], ["verifier", 2.0], ["vote", -1.0]]
    assert (settings["ppo_epochs"], settings["regularize"]) == (3, "kl-cov")
    assert (settings["token_weights"], settings["entropy_bonus"]) == ("tw-grpo", -0.5)


def test_unicode_in_prompts_answers_and_paths(rl: RL, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "prömpts 数学.jsonl"
    lines = [{"question": f"ζ{i} → 🙂?", "answer": "√2 ≈ ½ 🙂"} for i in range(3)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    flags = ("--reward", "verifier=1,token=0.01", "--system", "être bref — 短く")
    done = rl(*flags, data=path)
    assert done.code == 0
    assert "of 3 prompts," in done.err
    resumed = rl(*flags, "--resume", data=path)
    assert resumed.code == 0
    assert "resuming after step 2" in resumed.err
    shown = rl(*flags, "--dry-run", data=path)
    assert "ζ" in shown.out
    assert "🙂" in shown.out


def test_report_to_tensorboard(rl: RL, out: Path) -> None:
    assert rl("--report-to", "tensorboard").code == 0
    (events,) = (out / "tensorboard").iterdir()
    for name in (b"reward_std", b"zero_variance", b"policy_entropy"):
        assert name in events.read_bytes()


# ------------------------------------------------------------------------------------------------ recipes


def test_each_recipe_can_be_tried(emlocal: Emlocal, pair: ModelPair, data: Path, out: Path) -> None:
    wanted = {
        "paper-token": {"--reward": "token=1", "--samples": "4", "--prompts-per-step": "512"},
        "paper-sequence": {"--reward": "sequence=1", "--loss": "reinforce", "--normalize": "sum"},
        "grpo": {"--reward": "verifier=1", "--advantage": "grpo", "--averaging": "sequence"},
        "rloo": {"--reward": "verifier=1", "--advantage": "rloo", "--learning-rate": "0.000001"},
        "intuitor": {"--reward": "self-certainty=1", "--kl-beta": "0.005", "--schedule": "cosine"},
        "ttrl": {"--reward": "vote=1", "--samples": "32", "--learning-rate": "0.0000005"},
    }
    assert sorted(wanted) == recipes()
    for recipe, values in wanted.items():
        done = emlocal(
            *("rl", "-m", str(pair.gguf), "--data", str(data), "-o", str(out), "--recipe", recipe),
            *("--dry-run", "--max-tokens", "8", *SMALL),
        )
        assert done.code == 0
        assert values.items() <= told(done.out).items()
        assert "with one whole micro-batch" in done.out
        assert not re.search(r"\de[+-]\d", done.out)
        assert not out.exists()


def test_dry_run_tells_and_writes_nothing(rl: RL, out: Path, tmp_path: Path) -> None:
    before = {p.name for p in tmp_path.iterdir()}
    done = rl("--dry-run", "--limit", "5", "--reward", "verifier=1,token=0.01", "--alpha", "100")
    assert done.code == 0
    assert {p.name for p in tmp_path.iterdir()} - before <= {"cache"}  # the unpacked model
    values = told(done.out)
    assert values["prompts"] == "5 of 5"
    assert values["--reward"] == "verifier=1,token=0.01"
    assert (values["--alpha"], values["--clip-low"]) == ("100", "0.2")
    assert set(values) >= {known.flag for known in records_of(RLSettings).values()}  # each setting has a flag
    assert "a step                0 s (4 answers of 8 tokens)" in done.out
    masked = done.out[done.out.index("not in the loss") : done.out.index("in the loss (8 tokens")]
    assert "say " in masked


def test_a_recipe_that_was_copied_and_changed_then_config_then_flag(
    rl: RL, out: Path, tmp_path: Path
) -> None:
    original = Path(rl_settings.__file__).with_name("recipes") / "intuitor.toml"
    mine, config = tmp_path / "my récipe.toml", tmp_path / "run.toml"
    text = original.read_text(encoding="utf-8").replace("kl-beta = 0.005", "kl-beta = 0.25")
    mine.write_text(text.replace("clip-high = 0.2", "clip-high = 0.3"), encoding="utf-8")
    config.write_text(
        'reward = { token = 1, vote = 2 }\nclip-high = 0.4\nseed = 5\ntarget-modules = ["q_proj"]'
    )
    flags = ("--recipe", str(mine), "--config", str(config), "--seed", "7", "--reward", "sequence")
    assert rl(*flags, "--target-modules", "q_proj, v_proj,").code == 0
    settings = settings_in(out)
    assert settings["reward"] == [["sequence", 1.0]]  # flag over config
    assert settings["seed"] == 7
    assert settings["target_modules"] == ["q_proj", "v_proj"]
    assert settings["clip_high"] == 0.4  # config over recipe
    assert settings["kl_beta"] == 0.25  # recipe over default
    assert (settings["advantage"], settings["schedule"]) == ("grpo", "cosine")
    assert settings["rank"] == 4
    assert settings["max_kl"] == 1  # default
    assert len(read_adapter(out).pairs) == 4


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--reward", "entropy"], "--reward is 'entropy'; it must be token or sequence or"),
        (["--reward", ""], "--reward is ''; it must be token or"),
        (["--reward", "token,"], "--reward is ''; it must be token or"),
        (["--reward", "token,vote=2,token"], "--reward names no reward, or one twice"),
        (["--reward", "token=much"], "--reward has the weight 'much', which is not a number"),
        (["--reward", "token="], "--reward has the weight '', which is not a number"),
        (["--reward", "token=0"], "the weight of the reward token is 0; it must be a number, not 0"),
        (["--reward", "token=nan"], "the weight of the reward token is nan"),
        (["--reward", "token=inf"], "the weight of the reward token is inf"),
        (["--reward", "majority"], "--reward majority needs at least three answers; --samples is 2"),
        (["--regularize", "kl-cov", "--loss", "ppo-clip"], "--ppo-epochs is 1"),
        (["--regularize", "kl-cov", "--ppo-epochs", "2"], "--regularize kl-cov needs the ratio of ppo-clip"),
        (["--samples", "1"], "--samples is 1; it must be between 2 and"),
        (["--ppo-epochs", "0"], "--ppo-epochs is 0"),
        (["--clip-low", "1.5"], "--clip-low is 1.5; it must be between 0 and 1"),
        (["--kl-beta", "nan"], "--kl-beta is nan"),
        (["--tw-alpha", "0.5"], "--tw-alpha is 0.5; it must be between 1 and 100"),
        (["--clip-cov-share", "0"], "--clip-cov-share is 0; it must be more than 0"),
        (["--recipe", "paper"], "there is no recipe paper"),
        (["--recipe", "/no/such.toml"], "there is no file /no/such.toml"),
        (["--config", "/no/such.toml"], "there is no file /no/such.toml"),
        (["--config", "/"], "Is a directory"),
        (["--target-modules", " , "], "--target-modules is empty"),
        (["--target-modules", "q_proj,nope"], "no linear layer called nope"),
    ],
)
def test_what_cannot_be_meant_is_one_line(rl: RL, out: Path, arguments: list[str], says: str) -> None:
    done = rl(*arguments)
    assert done.code == 2
    assert says in error_of(done)
    assert done.out == ""
    assert not out.exists()


@pytest.mark.parametrize(
    "flag", ["--normalize", "--advantage", "--loss", "--averaging", "--regularize", "--token-weights"]
)
def test_choices_that_there_are_not(rl: RL, flag: str) -> None:
    done = rl(flag, "nonsense")
    assert done.code == 2
    assert flag in done.err
    assert "nonsense" in done.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat = 1e-4", "there is no setting 'learning_rat'"),
        ('reward = "entropy"', "--reward is 'entropy'"),
        ("reward = { token = true }", "it must be a name, or a table of names and weights"),
        ("samples = 1", "samples is 1"),
        ("steps = ", "cannot be read"),
    ],
)
@pytest.mark.parametrize("flag", ["--recipe", "--config"])
def test_files_that_cannot_be_meant(
    rl: RL, emlocal: Emlocal, data: Path, out: Path, tmp_path: Path, text: str, says: str, flag: str
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    done = emlocal("rl", "--data", str(data), "-o", str(out), flag, str(path))
    assert done.code == 2
    assert says in error_of(done)
    assert not out.exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_verifier_needs_answers(rl: RL, out: Path, unlabelled: Path, dry: list[str]) -> None:
    done = rl("--reward", "verifier", *dry, data=unlabelled)
    assert done.code == 2
    assert "questions.jsonl, line 2: there is no answer to compare with" in error_of(done)
    assert 'the reward verifier needs "answer" in each line' in done.err
    assert not out.exists()
    assert rl("--reward", "vote", *dry, data=unlabelled).code == 0


# ------------------------------------------------------------------------------------------ stop and go on


def test_resume_with_other_labels_is_refused_where_they_decide(rl: RL, out: Path, data: Path) -> None:
    flags = ("--reward", "verifier=1,token=0.01")
    assert rl(*flags).code == 0
    data.write_text(data.read_text().replace("#### 3", "#### 4"))
    done = rl(*flags, "--resume")
    assert done.code == 2
    assert "prompts.labels: " in error_of(done)


def test_resume_with_other_labels_that_decide_nothing(rl: RL, out: Path, data: Path) -> None:
    assert rl().code == 0
    data.write_text(data.read_text().replace("#### 3", "#### 4"))
    assert rl("--resume").code == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--reward", "sequence"], 'reward: [["token", 1.0]] -> [["sequence", 1.0]]'),
        (["--samples", "3"], "samples: 2 -> 3"),
        (
            ["--kl-beta", "0", "--entropy-bonus", "1"],
            "kl_beta: 0.001 -> 0; entropy_bonus: 0 -> 1",
        ),
        (["--recipe", "intuitor"], "reward: "),
    ],
)
def test_resume_with_other_settings_names_them(rl: RL, out: Path, changes: list[str], says: str) -> None:
    assert rl().code == 0
    done = rl("--resume", *changes)
    assert done.code == 2
    assert says in error_of(done)


@pytest.mark.parametrize("first", ["rl", "finetune"])
def test_a_folder_of_the_other_kind_is_refused(
    emlocal: Emlocal, pair: ModelPair, data: Path, out: Path, first: str
) -> None:
    flags = ("-m", str(pair.gguf), "--data", str(data), "-o", str(out), *SMALL)
    flags += ("--steps", "1", "--prompts-per-step", "2", "--max-tokens", "4", "--rank", "4")
    assert emlocal(first, *flags).code == 0
    held = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for resume in ([], ["--resume"]):
        done = emlocal("finetune" if first == "rl" else "rl", *flags, *resume)
        assert done.code == 2
        assert "has a run of another kind" in error_of(done)
        assert "-o" in done.err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == held


@pytest.mark.parametrize("rollouts", ["llama.cpp", "torch"])
def test_ctrl_c_and_resume_give_the_weights_of_a_run_in_one_go(
    rl: RL, out: Path, monkeypatch: pytest.MonkeyPatch, rollouts: str
) -> None:
    flags = ("--rollouts", rollouts, "--steps", "4", "--learning-rate", "0.01", "--save-every", "100", *FREE)
    flags += ("--reward", "token=1,verifier=1", "--loss", "ppo-clip", "--ppo-epochs", "2")
    flags += ("--tokens-per-batch", "40")
    assert rl(*flags).code == 0
    weights, rows = (out / "adapter_model.safetensors").read_bytes(), metrics(out)
    out.rename(out.with_name("whole"))
    real, seen = TerminalView.training, 0

    def training(self: TerminalView, step: int, done: int, total: int) -> None:
        nonlocal seen
        real(self, step, done, total)
        seen += step == 2 and done == total
        if seen == 3 and done == total:  # between the step's two updates
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TerminalView, "training", training)
        stopped = rl(*flags)
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == f"stopped ({out}); resume with the same command and --resume"
    resumed = rl(*flags, "--resume")
    assert resumed.code == 0
    assert "resuming after step 2" in resumed.err
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    assert timeless(metrics(out)) == timeless(rows)


def test_a_collapse_is_exit_1_with_the_adapter_of_before(rl: RL, out: Path) -> None:
    flags: tuple[Any, ...] = ("--steps", "40", "--learning-rate", "0.01", "--samples", "4", *FREE)
    done = rl(*flags, "--max-kl", "0.5")
    assert done.code == 1
    assert "stopped: the KL to the base is" in done.err
    assert "above --max-kl 0.5" in done.err
    assert done.err.splitlines()[-1].startswith("  emlocal chat -m ")
    rows = metrics(out)
    kept = int(re.findall(r"the adapter after (\d+) step", done.err)[-1])
    assert rows[kept]["kl"] <= 0.5 < rows[-1]["kl"]
    assert read_adapter(out).pairs
