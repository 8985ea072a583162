"""What tests on a CUDA device have in common."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

CUDA = torch.device("cuda")
ON_CUDA = (pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Within this block whatever makes the host wait for the device raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
