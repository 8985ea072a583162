"""`emlocal finetune` on a tiny model."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome
from tests.cli.finetune.runs import Emlocal, Finetune
from tests.tiny_pair import ModelPair


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"question": f"say {i}"}) + "\n" for i in range(6)))
    return path


@pytest.fixture
def finetune(emlocal: Emlocal, pair: ModelPair, data: Path, out: Path) -> Finetune:
    """A small run; later flags win over those here."""

    def go(*arguments: str, model: Path = pair.gguf, data: Path = data) -> Outcome:
        small = ["--steps", "2", "--prompts-per-step", "2", "--max-tokens", "8", "--rank", "4"]
        small += ["--threads", "1", "--dtype", "float32"]
        return emlocal("finetune", "-m", str(model), "--data", str(data), "-o", str(out), *small, *arguments)

    return go
