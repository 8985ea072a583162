"""The tiny model as a folder of transformers and as GGUF, once a session."""

from pathlib import Path

import pytest

from emlocal.models.gguf import GGUFHeader, read_header
from tests.tiny_pair import ModelPair, write_pair


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return write_pair(tmp_path_factory.mktemp("pair"), request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return write_pair(tmp_path_factory.mktemp("pair"), "llama")


@pytest.fixture
def base(llama: ModelPair) -> GGUFHeader:
    return read_header(llama.gguf)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
