"""Outputs, runs and evaluations that an earlier version began are recognised and can be resumed.

tests/data/made_by_863f4ab holds them, with the script that made them.
"""

import json
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import emlocal as package
from emlocal.identity import fingerprint, gguf_digest
from emlocal.models.adapters import read_adapter
from emlocal.models.resolve import resolve
from tests.cli.conftest import Outcome
from tests.cli.conftest import emlocal as emlocal
from tests.metrics import metrics

MADE = Path(__file__).parent / "data" / "made_by_863f4ab"
SMALL = (
    *("--steps", "4", "--prompts-per-step", "2", "--max-tokens", "6", "--rank", "1"),
    *("--target-modules", "q_proj", "--dtype", "float32", "--save-every", "2", "--device", "cpu"),
    *("--rollouts", "llama.cpp", "--parallel", "2", "--context", "64", "--max-length-change", "1000"),
    *("--max-repetition", "1", "--max-kl", "0", "--entropy-floor", "0"),
)
Emlocal = Callable[..., Outcome]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A copy, as if the installed packages had made it."""
    folder = tmp_path / "made"
    shutil.copytree(MADE, folder)
    for path in folder.glob("*/run.json"):
        run = json.loads(path.read_text())
        known = {"emlocal": package.__version__, "python": platform.python_version()}
        run["versions"] = {name: known.get(name) or version(name) for name in run["versions"]}
        path.write_text(json.dumps(run))
    return folder


def flags(made: Path) -> tuple[str, ...]:
    return ("-m", str(made / "tiny.gguf"), "--threads", "1")


def test_names_of_models() -> None:
    manifest = json.loads((MADE / "batch.jsonl.run").read_text())["settings"]
    assert fingerprint(MADE / "tiny.gguf") == manifest["model"]
    model = json.loads((MADE / "finetune" / "run.json").read_text())["model"]
    assert gguf_digest(resolve(str(MADE / "tiny.gguf")).header) == model["sha256"]  # type: ignore[arg-type]


def test_a_batch_goes_on(made: Path, tmp_path: Path, emlocal: Emlocal) -> None:
    output = made / "batch.jsonl"
    whole = output.read_bytes()
    output.write_bytes(whole.splitlines(keepends=True)[0])
    asked = ("--raw", "--em-inf", "--seed", "3", "--max-tokens", "5", "--context", "64")
    done = emlocal("batch", str(made / "in.jsonl"), "-o", str(output), *flags(made), *asked)
    assert done.code == 0, done.err
    assert "2 answers" in done.err
    assert "1 already there" in done.err
    assert [json.loads(line)["text"] for line in output.read_text().splitlines()] == [
        json.loads(line)["text"] for line in whole.splitlines()
    ]
    other = emlocal("batch", str(made / "in.jsonl"), "-o", str(output), *flags(made), *asked, "--temp", "1")
    assert other.code == 2
    assert "was started with other settings: sampling.temperature: 0.5 -> 1" in other.err


@pytest.mark.parametrize(("verb", "more"), [("finetune", ("--validate",)), ("rl", ("--samples", "2"))])
def test_a_training_run_goes_on(made: Path, emlocal: Emlocal, verb: str, more: tuple[str, ...]) -> None:
    out, data = made / verb, str(made / "data.jsonl")
    more = (*more, data) if verb == "finetune" else more
    wanted, rows = read_adapter(out), metrics(out)
    shutil.rmtree(out / "checkpoints" / "step-000004")
    asked = ("--data", data, "-o", str(out), *SMALL, *more)
    done = emlocal(verb, *flags(made), *asked, "--resume")
    assert done.code == 0, done.err
    assert "resuming after step 2" in done.err
    assert "warning" not in done.err
    assert [row["step"] for row in metrics(out)] == [row["step"] for row in rows]
    for name, pair in read_adapter(out).pairs.items():  # the last bits are those of one processor
        np.testing.assert_allclose(pair.b, wanted.pairs[name].b, rtol=1e-3, atol=1e-7)
    other = emlocal(verb, *flags(made), *asked, "--resume", "--rank", "2")
    assert "has other settings: rank: 1 -> 2" in other.err


def test_an_evaluation_goes_on(made: Path, emlocal: Emlocal) -> None:
    def texts() -> dict[str, list[Any]]:
        answers = (made / "eval" / "answers").glob("*.jsonl")
        return {path.name: [json.loads(line)["text"] for line in path.open()] for path in answers}

    before = texts()
    asked = ("--task", "questions", "--data", str(made / "data.jsonl"), "--max-tokens", "5")
    more = ("--parallel", "2", "--context", "200", "-o", str(made / "eval"))
    done = emlocal("eval", *flags(made), *asked, *more, "--methods", "greedy,sample")
    assert done.code == 0, done.err
    assert texts() == before
    assert not (made / "eval" / "made_with.jsonl").exists()  # nothing was answered again
    assert json.loads((made / "eval" / "results.json").read_text())["task"]["name"] == "data"
