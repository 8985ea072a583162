"""Ctrl-C that stops an answer, not the program."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Cancellation:
    """A flag that long work looks at. `requested` becomes true once and stays so."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested


@contextmanager
def interruptible() -> Iterator[Cancellation]:
    """Within this block the first Ctrl-C sets the flag, and the second raises KeyboardInterrupt.

    An exception out of a signal handler could tear llama.cpp's state apart midway; a flag cannot. Outside
    the main thread signals cannot be caught, and nothing is.
    """
    cancellation = Cancellation()

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if cancellation.requested:
            raise KeyboardInterrupt
        cancellation.requested = True

    if threading.current_thread() is not threading.main_thread():
        yield cancellation
        return
    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield cancellation
    finally:
        signal.signal(signal.SIGINT, previous)
