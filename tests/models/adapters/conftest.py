"""Fixtures for the adapter tests."""

import pytest

from emlocal.models.gguf import GGUFHeader, read_header
from tests.tiny_pair import ModelPair


@pytest.fixture
def base(pair: ModelPair) -> GGUFHeader:
    return read_header(pair.gguf)
