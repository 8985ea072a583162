"""Folders that already hold a run, or something else."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emlocal.cli.training_view import TerminalView
from tests.cli.finetune.runs import ROW, Emlocal, Finetune
from tests.cli.training import error_of
from tests.metrics import metrics, timeless
from tests.tiny_pair import ModelPair


def test_a_run_that_is_there_needs_resume_and_ends_at_once_with_it(finetune: Finetune, out: Path) -> None:
    assert finetune().code == 0
    weights = (out / "adapter_model.safetensors").read_bytes()
    again = finetune()
    assert again.code == 2
    assert "has a run already" in error_of(again)
    assert "--resume" in again.err
    resumed = finetune("--resume")
    assert resumed.code == 0
    assert "resuming after step 2" in resumed.err
    assert len(list(filter(ROW.fullmatch, resumed.err.splitlines()))) == 1
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    assert [row["step"] for row in metrics(out)] == [0, 1, 2]


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

    real = TerminalView.finished_step

    def finished_step(self: TerminalView, row: dict[str, Any]) -> None:
        real(self, row)
        if row["step"] == stop_at:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TerminalView, "finished_step", finished_step)
        stopped = finetune(*flags)
    assert stopped.code == 130
    assert stopped.err.splitlines()[-1] == f"stopped ({out}); resume with the same command and --resume"
    assert (out / "adapter_model.safetensors").read_bytes() != weights
    resumed = finetune(*flags, "--resume")
    assert resumed.code == 0
    assert f"resuming after step {stop_at + 1}" in resumed.err
    assert (out / "adapter_model.safetensors").read_bytes() == weights
    assert timeless(metrics(out)) == timeless(rows)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["--learning-rate", "0.5"], "learning_rate: 0.0001 -> 0.5"),
        (["--steps", "3", "--seed", "1"], "steps: 2 -> 3; seed: 0 -> 1"),
        (["--limit", "5"], "prompts.count: 6 -> 5"),
        (["--system", "be brief"], "prompts.sha256: "),
        (["--rollouts", "torch"], 'engines.rollouts: "llama.cpp" -> "torch"'),
        (["--context", "100"], "engines.context: 256 -> 100"),
        (["--parallel", "1"], "engines.parallel: 2 -> 1"),
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
    assert "prompts.sha256: " in error_of(finetune("--resume"))


def test_resume_where_nothing_is_begins_and_says_so(finetune: Finetune, out: Path) -> None:
    done = finetune("--resume")
    assert done.code == 0
    assert "has no run to resume: starting a new one" in done.err


def test_a_smaller_token_budget_is_heeded_on_resume_and_said(finetune: Finetune) -> None:
    assert finetune().code == 0
    done = finetune("--resume", "--tokens-per-batch", "30")
    assert done.code == 0
    assert "continuing with micro-batches of 30 tokens instead of 2,048" in done.err
    assert "micro-batches" not in finetune("--resume", "--tokens-per-batch", "4096").err


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_an_output_that_is_something_else_is_left_alone(
    finetune: Finetune, out: Path, make: Callable[[Path], None]
) -> None:
    make(out)
    if out.is_dir():
        (out / "thesis.tex").write_text("years of work")
    done = finetune()
    assert done.code == 2
    assert "has other files: thesis.tex" in done.err or f"{out} is not a folder" in done.err
    assert not out.is_dir() or [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_an_output_that_cannot_be_written(emlocal: Emlocal, pair: ModelPair, data: Path) -> None:
    done = emlocal(
        *("finetune", "-m", str(pair.gguf), "--data", str(data), "-o", "/proc/nowhere/out"),
        *("--threads", "1", "--dtype", "float32", "--max-tokens", "8"),
    )
    assert done.code == 1
    assert "cannot write /proc/nowhere/out" in error_of(done)
