"""Helpers for tests on a CUDA device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

CUDA = torch.device("cuda")
ON_CUDA = (pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Raises RuntimeError for any operation within the block that makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
