"""Signals: Ctrl-C stops an answer, not the program; SIGTERM waits until the answer has stopped."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from emlocal.errors import CancelledError

T = TypeVar("T")
_LOOK_SECONDS = 0.05  # between two checks of `cancelled`
_unfinished: set[threading.Thread] = set()


def never() -> bool:
    """Returns False: the `cancelled` of work that nobody can stop."""
    return False


class Cancellation:
    """A flag that long work checks. `requested` becomes true once and stays true."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested


_active: list[Cancellation] = []  # the blocks that the main thread is in, outermost first


def stop_requested() -> bool:
    """Returns whether Ctrl-C or SIGTERM asked a block of `interruptible` to stop; for waits inside it."""
    return any(cancellation.requested for cancellation in _active)


@contextmanager
def interruptible() -> Iterator[Cancellation]:
    """Turns signals into a flag within this block.

    The first Ctrl-C sets the flag, the second raises KeyboardInterrupt. SIGTERM sets the flag, too. When the
    block ends, SIGTERM is passed on to the enclosing block or to the handler that ends the program. A second
    SIGTERM is passed on at once.

    An exception out of a signal handler could leave llama.cpp in a broken state; a flag cannot. Outside the
    main thread Python cannot catch signals, so the block changes nothing there.
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
    """Runs `work`, a native call that cannot see signals, in a thread of its own and returns its result.

    The calling thread waits and handles signals at once. Abandoned work continues until it or the process
    ends (see `unfinished`), so it must not touch memory that may be freed before then.

    Raises CancelledError when `cancelled()` becomes true or a block of `interruptible` is asked to stop, and
    passes on the errors of `work`.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001
            errors.append(error)  # raised again in the thread that waits
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
    """Returns whether abandoned work still runs. The process must then end without freeing what it uses."""
    return bool(_unfinished)


@contextmanager
def _termination_waits(cancellation: Cancellation) -> Iterator[None]:
    """Sets the flag at the first SIGTERM within this block, and raises the signal again at the end."""
    outer = signal.getsignal(signal.SIGTERM)
    if outer is None or outer is signal.SIG_IGN:  # not ours to restore, or ignored on purpose
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
