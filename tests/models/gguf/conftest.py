"""The real library, in a separate process."""

from collections.abc import Iterator

import pytest

from tests.models.gguf.loading import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()
