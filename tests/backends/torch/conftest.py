"""Tests here run on each architecture."""

import pytest

from tests.tiny_pair import ModelPair


@pytest.fixture(scope="session")
def pair(any_pair: ModelPair) -> ModelPair:
    return any_pair
