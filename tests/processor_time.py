"""A bound on the work of a test, which a busy machine does not change."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail where the block takes this process more of a processor: choose so many seconds that only work
    that never ends, or grows with the square, takes them."""
    started = time.process_time()
    yield
    took = time.process_time() - started
    assert took < seconds, f"{took:.1f} s of the processor"
