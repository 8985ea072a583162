"""`emlocal finetune` on a tiny model."""

import json
from pathlib import Path

import pytest

from emlocal.models.resolve import LocalModel, resolve
from emlocal.models.unpacked import unpack
from tests.cli.conftest import Outcome
from tests.cli.finetune.runs import Emlocal, Finetune
from tests.tiny_pair import ModelPair


@pytest.fixture(scope="session")
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
def finetune(emlocal: Emlocal, pair: ModelPair, data: Path, out: Path) -> Finetune:
    """A small run; later flags win over those here."""

    def go(*arguments: str, model: Path = pair.gguf, data: Path = data) -> Outcome:
        small = ["--steps", "2", "--prompts-per-step", "2", "--max-tokens", "8", "--rank", "4"]
        small += ["--threads", "1", "--dtype", "float32"]
        return emlocal("finetune", "-m", str(model), "--data", str(data), "-o", str(out), *small, *arguments)

    return go
