"""The real library, in a process of its own."""

from collections.abc import Iterator

import pytest

from tests.models.gguf.loading import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()
