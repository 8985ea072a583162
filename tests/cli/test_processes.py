"""Training in several processes of a launcher: the same run, with shared-out rollouts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emlocal.models.adapters import read_adapter
from tests.tiny_pair import ModelPair, write_pair

SMALL = [
    *("--steps", "2", "--prompts-per-step", "3", "--max-tokens", "8", "--rank", "4", "--threads", "1"),
    *("--dtype", "float32", "--learning-rate", "1e-2", "--entropy-floor", "0", "--max-repetition", "1"),
    *("--max-length-change", "100", "--max-kl", "100", "--device", "cpu"),
]
METHODS = {
    "finetune": ["finetune"],
    "rl": ["rl", "--samples", "3", "--token-weights", "tw-grpo", "--loss", "ppo-clip", "--ppo-epochs", "2"],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return write_pair(tmp_path_factory.mktemp("pair"), "llama")


def train(pair: ModelPair, out: Path, method: str, launcher: list[str], *more: str) -> str:
    data = out.parent / "prompts.jsonl"
    data.write_text("".join(json.dumps({"question": f"say {i}"}) + "\n" for i in range(6)))
    command = [sys.executable, *launcher, "-m", "emlocal", *METHODS[method], *SMALL, *more]
    command += ["-m", str(pair.gguf), "--data", str(data), "-o", str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


LAUNCHED = [
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--standalone",
]  # accelerate launch would take GPUs


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_make_the_weights_of_one(pair: ModelPair, tmp_path: Path, method: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(pair, one, method, [])
    said = train(pair, two, method, LAUNCHED)
    assert said.count("finished: 2 steps") == 1  # only one process reports
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    rows = [[json.loads(line) for line in (out / "metrics.jsonl").open()] for out in (one, two)]
    for alone, together in zip(*rows, strict=True):
        assert alone["tokens"] == together["tokens"]
        assert alone["entropy"] == pytest.approx(together["entropy"], abs=1e-4)
        assert (alone.get("kl") or 0) == pytest.approx(together.get("kl") or 0, abs=1e-4)
    a, b = read_adapter(one), read_adapter(two)
    for name, pair_of_a in a.pairs.items():
        assert np.abs(pair_of_a.b).max() > 1e-3
        assert np.allclose(pair_of_a.b, b.pairs[name].b, atol=2e-4)


def test_a_run_of_two_is_resumed_by_two(pair: ModelPair, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(pair, whole, "rl", LAUNCHED, "--save-every", "1")
    train(pair, out, "rl", LAUNCHED, "--save-every", "1")
    for name in ("step-000002", "step-000001"):
        assert (out / "checkpoints" / name).is_dir()
    (out / "checkpoints" / "step-000002" / "state.json").write_text("torn")
    said = train(pair, out, "rl", LAUNCHED, "--save-every", "1", "--resume")
    assert "resuming after step 1" in said
    for name, pair_of_a in read_adapter(whole).pairs.items():
        assert (pair_of_a.b == read_adapter(out).pairs[name].b).all()
