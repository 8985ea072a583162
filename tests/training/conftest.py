"""The tiny model as torch trains it and llama.cpp answers with it."""

from pathlib import Path

import pytest

from tests.tiny_pair import ModelPair, write_pair


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def any_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return write_pair(tmp_path_factory.mktemp("pair"), request.param)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return write_pair(tmp_path_factory.mktemp("pair"), "llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"
