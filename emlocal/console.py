"""Output for people: the answer on stdout, everything else on stderr, colours and bars if possible."""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from emlocal.errors import EmlocalError
from emlocal.files import Progress, silent
from emlocal.text import counted, harmless, human_size

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_SECONDS = 5.0  # between lines of progress if stderr is not a terminal
_NO_WIDTH = 1000  # a pipe has no columns; emlocal prints no wider table


@cache
def err() -> "Console":
    """Returns the console of stderr."""
    return _console(stderr=True, soft_wrap=not sys.stderr.isatty())


@cache
def out() -> "Console":
    """Returns the console of stdout, for tables. An answer's text is written with `write`."""
    terminal = sys.stdout.isatty()
    return _console(soft_wrap=not terminal, width=None if terminal else _NO_WIDTH)


def _console(**settings: Any) -> "Console":
    """Returns a console that never prints escape codes; messages quote files, names and templates."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Harmless(Console):
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                text, style, control = segment
                plain = control is not None or text.isprintable() or text == "\n"
                yield segment if plain else Segment(harmless(text), style)

    return Harmless(highlight=False, **settings)


def note(text: str) -> None:
    """Prints a dim line on stderr."""
    err().print(harmless(text), style="dim", markup=False)


def dim(text: str) -> None:
    """A dim piece of text on stderr, as it comes."""
    err().out(text, style="dim", end="")


def command(words: Sequence[str]) -> None:
    """Prints a command line to copy on stderr: quoted for a shell, never broken into lines."""
    err().print(f"  {shlex.join(words)}", style="dim", markup=False, soft_wrap=True)


def warn(text: str) -> None:
    """Prints a warning on stderr."""
    err().print(f"warning: {harmless(text)}", style="yellow", markup=False)


def write(text: str) -> None:
    """Writes a piece of text to stdout at once; characters that its encoding lacks are replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def print_json(value: Any) -> None:
    """Prints one JSON value on stdout."""
    write(json.dumps(value, ensure_ascii=False, indent=2 if sys.stdout.isatty() else None) + "\n")


def hush() -> None:
    """Silences everything but errors on stderr from now on.

    For one of several processes that do the same work.
    """
    err().quiet = True


def report(error: EmlocalError) -> None:
    """Prints an error and its fix on stderr."""
    err().quiet = False
    err().print(f"error: {harmless(error.message)}", style="bold red", markup=False)
    if error.hint:
        err().print(f"  fix: {harmless(error.hint)}", markup=False)


def pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Prints a table of (name, text) without a frame on stdout."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in rows:
        table.add_row(Text(name), Text(text, overflow="fold"))
    out().print(table)


def show_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints facts on stdout: as one JSON object, or one line each for people."""
    if as_json:
        write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    else:
        pairs((name.replace("_", " "), _fact(name, value)) for name, value in facts.items())


def _fact(name: str, value: object) -> str:
    """Returns one fact as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return human_size(value) if name.endswith("bytes") else f"{value:,}"
    if name == "sampling_in_effect" and isinstance(value, dict):
        return "\n".join(f"{k} {v['value']} ({v['from']})" for k, v in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:g}" for k, v in value.items()) or "not given"
    if isinstance(value, list):
        between = "\n" if name == "files" else ", "
        return between.join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return "not given" if value is None else str(value)


def heading(text: str) -> None:
    """Prints a line above a part of an answer on stdout."""
    out().print(text, style="bold", markup=False)


@contextmanager
def no_echo() -> Iterator[None]:
    """Hides what is typed on the terminal within this block. The next prompt reads it."""
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
def working(label: str, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Yields a callback that counts tokens: a spinner on a terminal, a line now and then elsewhere."""
    count = 0
    if quiet:
        yield lambda: None
        return
    if not err().is_terminal:
        yield _ticking_lines(label)
        return
    with err().status(label) as status:

        def tick() -> None:
            nonlocal count
            count += 1
            status.update(f"{label}: {counted(count, 'token')}")

        yield tick


@contextmanager
def progress(quiet: bool = False) -> Iterator[Progress]:
    """Yields a Progress on stderr: a bar or a spinner on a terminal, lines elsewhere.

    The spinner is for work without counts.
    """
    if quiet:
        yield silent
    elif err().is_terminal:
        yield from _bar()
    else:
        yield _plain_lines()


def _bar() -> Iterator[Progress]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        SpinnerColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    label_column = TextColumn("{task.description}", markup=False)
    uncounted = (SpinnerColumn(), label_column)
    counted = (label_column, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(*uncounted, console=err(), transient=True) as bars:
        task = bars.add_task("", total=None)

        def report(label: str, done: int, total: int | None) -> None:
            bars.columns = counted if done or total else uncounted
            bars.update(task, description=label, completed=done, total=total)

        yield report


@contextmanager
def counting(total: int | None, quiet: bool = False, label: str = "") -> Iterator[Callable[[int, str], None]]:
    """Yields a callback (number done, text beside it) that draws a bar, or prints a line now and then.

    `label` says what is counted.
    """
    if quiet:
        yield lambda done, text: None
    elif err().is_terminal:
        yield from _counting_bar(total, label)
    else:
        yield _counting_lines(total, label)


def _counting_bar(total: int | None, label: str) -> Iterator[Callable[[int, str], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    text = TextColumn("{task.description}", markup=False)
    with Bars(
        MofNCompleteColumn(),
        BarColumn(),
        text,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err(),
        transient=True,
    ) as bars:
        task = bars.add_task("", total=total)
        yield lambda done, said: bars.update(task, completed=done, description=said or label)


def _counting_lines(total: int | None, label: str) -> Callable[[int, str], None]:
    last, begun = time.monotonic(), False
    before = f"{label}: " if label else ""
    of = f" of {total:,}" if total else ""

    def show(done: int, text: str) -> None:
        nonlocal last, begun
        now = time.monotonic()
        ends = begun and done == total
        if now - last >= _PLAIN_SECONDS or ends:
            last, begun = now, not ends
            err().print(f"{before}{done:,}{of}{', ' if text else ''}{text}", markup=False)

    return show


def _ticking_lines(label: str) -> Callable[[], None]:
    count, last = 0, time.monotonic()

    def tick() -> None:
        nonlocal count, last
        count += 1
        now = time.monotonic()
        if now - last >= _PLAIN_SECONDS:
            last = now
            err().print(f"{label}: {counted(count, 'token')}", markup=False)

    return tick


def _plain_lines() -> Progress:
    """Returns a Progress that prints a line every few seconds.

    Each counted label has an interval of its own; all labels without a count share one.
    """
    last: dict[str, float] = {}

    def report(label: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        key = label if done or total else ""
        if now - last.get(key, -_PLAIN_SECONDS) >= _PLAIN_SECONDS:
            last[key] = now
            of = f" of {human_size(total)}" if total else ""
            err().print(f"{label} {human_size(done)}{of}" if key else label, markup=False)

    return report


def colours_allowed(stream: Any) -> bool:
    """Returns whether escape codes may be written to this stream."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
