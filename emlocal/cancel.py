"""Ctrl-C that stops an answer, not the program; SIGTERM that waits until the answer has stopped."""

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


_active: list[Cancellation] = []  # of the blocks that the main thread is in


def stop_requested() -> bool:
    """Whether Ctrl-C or SIGTERM asked a block of `interruptible` to stop, for waits deep inside it."""
    return any(cancellation.requested for cancellation in _active)


@contextmanager
def interruptible() -> Iterator[Cancellation]:
    """Within this block the first Ctrl-C sets the flag, and the second raises KeyboardInterrupt.

    So does SIGTERM, which is handed on when the block has ended: to a block around it, or to what ends the
    program. A second one is handed on at once.

    An exception out of a signal handler could tear llama.cpp's state apart midway; a flag cannot. Outside
    the main thread signals cannot be caught, and nothing is.
    """
    cancellation = Cancellation()
    if threading.current_thread() is not threading.main_thread():
        yield cancellation
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        if cancellation.requested:
            raise KeyboardInterrupt
        cancellation.requested = True

    previous = signal.signal(signal.SIGINT, on_interrupt)
    _active.append(cancellation)
    try:
        with _termination_waits(cancellation):
            yield cancellation
    finally:
        _active.remove(cancellation)
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _termination_waits(cancellation: Cancellation) -> Iterator[None]:
    """Within this block the first SIGTERM sets the flag and is raised again at the end."""
    outer = signal.getsignal(signal.SIGTERM)
    if outer is None or outer is signal.SIG_IGN:  # not ours to put back, or not wanted
        yield
        return
    pending = False

    def on_terminate(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        if cancellation.requested:
            pending = False
            signal.signal(number, outer)
            signal.raise_signal(number)
        else:
            cancellation.requested = pending = True

    signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, outer)
        if pending:
            signal.raise_signal(signal.SIGTERM)
