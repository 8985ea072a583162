"""Ctrl-C that stops an answer, not the program; SIGTERM that waits until the answer has stopped."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from emlocal.errors import CancelledError

T = TypeVar("T")
_LOOK_SECONDS = 0.05  # between two looks at `cancelled`
_unfinished: set[threading.Thread] = set()


def never() -> bool:
    """What long work looks at where nobody can stop it."""
    return False


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


def waited_for(work: Callable[[], T], cancelled: Callable[[], bool] = lambda: False) -> T:
    """The result of `work`, a native call that hears no signals, from a thread of its own.

    This thread waits meanwhile: signals are handled at once. Work that is given up goes on until it ends or
    the process does (see `unfinished`), so it must not touch what may be freed before.

    Raises CancelledError when `cancelled()` becomes true or a block of `interruptible` is asked to stop, and
    what `work` raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001
            errors.append(error)  # for the thread that waits
        finally:
            _unfinished.discard(thread)
            done.set()

    thread = threading.Thread(target=run, daemon=True)
    _unfinished.add(thread)
    thread.start()
    while not done.wait(_LOOK_SECONDS):
        if cancelled() or stop_requested():
            raise CancelledError
    if errors:
        raise errors[0]
    return results[0]


def unfinished() -> bool:
    """Whether work that was given up still runs. The process must then end without cleaning up under it."""
    return bool(_unfinished)


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
