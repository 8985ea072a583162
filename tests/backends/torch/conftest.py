"""The tiny model as a folder and as a GGUF file."""

import pytest

from tests.tiny_pair import ModelPair, write_pair


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return write_pair(tmp_path_factory.mktemp("pair"), request.param)
