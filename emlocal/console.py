"""What people see: the answer on stdout, everything else on stderr, colours and bars where they can be."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from emlocal.errors import EmlocalError

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_SECONDS = 5.0  # between lines of progress where stderr is no terminal


@cache
def err() -> "Console":
    """The console of stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


@cache
def out() -> "Console":
    """The console of stdout, for tables; an answer's text is written with `write`."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def note(text: str) -> None:
    """A dim line on stderr."""
    err().print(text, style="dim", markup=False)


def warn(text: str) -> None:
    """A line on stderr that should be read."""
    err().print(f"warning: {text}", style="yellow", markup=False)


def write(text: str) -> None:
    """A piece of text to stdout, at once, whatever the terminal's encoding can show of it."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


# A model may say anything, escape codes that repaint or retitle a terminal among it: not to a terminal.
CONTROLS = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    write(json.dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None) + "\n")


def report(error: EmlocalError) -> None:
    """What failed, and what mends it."""
    err().print(f"error: {error.message}", style="bold red", markup=False)
    if error.hint:
        err().print(f"  fix: {error.hint}", markup=False)


def heading(text: str) -> None:
    """A line above a part of an answer, on stdout."""
    out().print(text, style="bold", markup=False)


@contextmanager
def no_echo() -> Iterator[None]:
    """Within this block the terminal does not show what is typed; the next prompt reads it."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@contextmanager
def working(label: str) -> Iterator[Callable[[], None]]:
    """A spinner that counts tokens, on a terminal; nothing elsewhere."""
    count = 0
    if not err().is_terminal:
        yield lambda: None
        return
    with err().status(label) as status:

        def tick() -> None:
            nonlocal count
            count += 1
            status.update(f"{label}: {count} tokens")

        yield tick


@contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str, int, int | None], None]]:
    """A callback (label, bytes done, bytes in all or None) that draws a bar, or prints lines."""
    if quiet:
        yield lambda label, done, total: None
    elif err().is_terminal:
        yield from _bar()
    else:
        yield _plain_progress()


def _bar() -> Iterator[Callable[[str, int, int | None], None]]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(label: str, done: int, total: int | None) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=total)
            bar.update(tasks[label], completed=done, total=total)

        yield update


def _plain_progress() -> Callable[[str, int, int | None], None]:
    last = 0.0

    def update(label: str, done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _PLAIN_SECONDS or done == total:
            last = now
            of = f" of {total / 1e6:.0f}" if total else ""
            err().print(f"{label}: {done / 1e6:.0f}{of} MB", markup=False)

    return update


def colours_allowed(stream: Any) -> bool:
    """Whether escape codes may go to this stream."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
