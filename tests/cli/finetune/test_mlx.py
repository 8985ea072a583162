"""`emlocal finetune --backend mlx` on a tiny model: mlx trains it, llama.cpp or mlx answers."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emlocal.cli.training_view import TerminalView
from emlocal.models.adapters import read_adapter
from tests.cli.finetune.runs import ROW, Emlocal, Finetune
from tests.cli.training import error_of
from tests.metrics import metrics
from tests.tiny_pair import ModelPair

MLX = ("--backend", "mlx")
LONG = ("--steps", "3", "--learning-rate", "0.01", "--save-every", "100", "--max-length-change", "100")


def test_a_run_says_what_trains_and_leaves_an_adapter(finetune: Finetune, out: Path) -> None:
    done = finetune(*MLX)
    assert done.code == 0, done.err
    assert "trained on mlx, cpu, float32 (MLX finds no GPU" in done.err
    assert "answers by llama.cpp, 2 at once" in done.err
    assert len(list(filter(ROW.fullmatch, done.err.splitlines()))) == 3
    versions = json.loads((out / "run.json").read_text())["versions"]
    assert {"mlx", "mlx-lm", "llama-cpp-python"} <= versions.keys()
    assert "torch" not in versions
    assert all(np.abs(pair.b).max() > 0 for pair in read_adapter(out, None).pairs.values())


def test_it_trains_what_torch_trains(finetune: Finetune, out: Path) -> None:
    """llama.cpp gives the same answers in the first step, so the gradient is the same."""
    assert finetune(*MLX, "--steps", "1").code == 0
    ours = metrics(out)
    shutil.rmtree(out)
    assert finetune("--backend", "torch", "--steps", "1").code == 0
    theirs = metrics(out)
    for name in ("loss", "entropy", "kl", "gradient_norm", "length"):
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("rollouts", ["llama.cpp", "mlx"])
def test_ctrl_c_and_resume_give_the_weights_of_a_run_in_one_go(
    finetune: Finetune, out: Path, monkeypatch: pytest.MonkeyPatch, rollouts: str
) -> None:
    flags = (*MLX, *LONG, "--rollouts", rollouts, "--tokens-per-batch", "40")
    whole = finetune(*flags)
    assert whole.code == 0, whole.err
    weights = (out / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out)
    real = TerminalView.finished_step

    def finished_step(self: TerminalView, row: dict[str, Any]) -> None:
        real(self, row)
        if row["step"] == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(TerminalView, "finished_step", finished_step)
        assert finetune(*flags).code == 130
    assert (out / "adapter_model.safetensors").read_bytes() != weights
    resumed = finetune(*flags, "--resume")
    assert resumed.code == 0
    assert "resuming after step 2" in resumed.err
    assert (out / "adapter_model.safetensors").read_bytes() == weights


def test_checkpointing_and_small_batches_change_little(finetune: Finetune, out: Path) -> None:
    assert finetune(*MLX, *LONG, "--steps", "1").code == 0
    plain = read_adapter(out, None)
    shutil.rmtree(out)
    more = ("--gradient-checkpointing", "--tokens-per-batch", "1")
    assert finetune(*MLX, *LONG, "--steps", "1", *more).code == 0
    for name, pair in read_adapter(out, None).pairs.items():
        np.testing.assert_allclose(pair.b, plain.pairs[name].b, atol=2e-3)  # the weights are about 0.01


def test_its_adapter_runs_on_every_engine(
    finetune: Finetune, emlocal: Emlocal, pair: ModelPair, out: Path, tmp_path: Path
) -> None:
    """As it is and converted, it changes every engine's text. Engines that compute in float32 agree."""
    assert finetune(*MLX, *LONG, "--learning-rate", "0.05").code == 0
    converted = str(tmp_path / "adapter.gguf")
    assert emlocal("adapter", "convert", str(out), "-o", converted, "--base", str(pair.gguf)).code == 0

    def said(engine: str, *adapter: str) -> str:
        flags = ("-m", str(pair.gguf), "--backend", engine, "--temp", "0", "--max-tokens", "12", "-q")
        done = emlocal("generate", *flags, *adapter, "hello")
        assert done.code == 0, done.err
        return done.out

    for engine in ("llama.cpp", "torch", "mlx"):
        assert said(engine, "--adapter", str(out)) != said(engine)
        assert said(engine, "--adapter", str(out)) == said(engine, "--adapter", converted)
    assert said("mlx", "--adapter", str(out)) == said("llama.cpp", "--adapter", str(out))


def test_a_dry_run_tells_memory_and_writes_nothing(finetune: Finetune, out: Path) -> None:
    done = finetune(*MLX, "--dry-run")
    assert done.code == 0, done.err
    assert "trained on mlx" in done.out
    assert re.search(r"[MG]B at its peak", done.out)
    assert not out.exists()


def test_a_folder_is_answered_by_the_model_itself(finetune: Finetune, folder: Path) -> None:
    done = finetune(*MLX, "--steps", "1", model=folder)
    assert done.code == 0, done.err
    assert "answers by mlx, 2 at once" in done.err


def test_what_does_not_go_together_is_refused(
    finetune: Finetune,
    emlocal: Emlocal,
    pair: ModelPair,
    data: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for trainer, rollouts in (("mlx", "torch"), ("torch", "mlx")):
        refused = finetune("--backend", trainer, "--rollouts", rollouts)
        assert refused.code == 2
        assert f"--rollouts is {rollouts}, but {trainer} trains" in error_of(refused)
    rl = ("rl", *MLX, "-m", str(pair.gguf), "--data", str(data), "-o", str(out))
    assert "the mlx engine does not support this training yet" in error_of(emlocal(*rl))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the mlx engine cannot train with several processes" in error_of(finetune(*MLX))
    assert not out.exists()
