"""A limit on a test's work that a busy machine does not change."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fails if the block uses more processor time of this process than `seconds`.

    Choose a limit that only endless or quadratic work reaches.
    """
    started = time.process_time()
    yield
    took = time.process_time() - started
    assert took < seconds, f"{took:.1f} s of the processor"
