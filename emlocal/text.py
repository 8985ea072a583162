"""Text helpers: untrusted text made safe, JSON and lines of files read within limits, numbers in words.

`longest_of` builds a regular expression that searches for many texts at once.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, BinaryIO

# A model may write anything, also escape codes that repaint or retitle a terminal. They must not reach one.
CONTROLS = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def harmless(text: str) -> str:
    """Returns text from a file or a model without escape codes and half characters, safe for any terminal."""
    return text.translate(CONTROLS).encode(errors="replace").decode()


def well_formed(text: str) -> str:
    """Returns the text with surrogate pairs joined and lone surrogates replaced by U+FFFD.

    Python uses surrogates (half characters) for bytes that are not UTF-8, and JSON can contain them. Files
    cannot.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_json(raw: bytes | str) -> Any:
    """Returns the value of an untrusted JSON text (bytes: UTF-8).

    Raises ValueError, and nothing else, with one line that says what is wrong. Faults are bytes that are not
    UTF-8, text that is not JSON, too deep nesting, and numbers of thousands of digits.
    """
    try:
        return json.loads(raw.decode() if isinstance(raw, bytes) else raw)
    except UnicodeDecodeError as why:
        raise ValueError(f"byte 0x{why.object[why.start]:02x} at offset {why.start:,} is not UTF-8") from None
    except json.JSONDecodeError as why:
        raise ValueError(f"not JSON: {why.msg} at line {why.lineno:,}, column {why.colno:,}") from None
    except RecursionError:
        raise ValueError("lists and objects are nested too deeply") from None
    except ValueError:  # Python limits the digits, because reading them takes quadratic time
        raise ValueError("a number has too many digits") from None


def longest_of(texts: Iterable[str]) -> str:
    """Returns a regular expression that matches the longest of these texts; without texts it matches nothing.

    The texts share their beginnings, as in `<\\|im_(?:end\\|>|start\\|>)`, so the search time hardly grows
    with their number.
    """
    return _branches(sorted({text for text in texts if text}), 0) or "(?!)"


def _branches(texts: Sequence[str], at: int) -> str:
    """Returns the expression for sorted texts from `at` on; before `at` they agree."""
    ends = bool(texts) and len(texts[0]) == at
    by_next: dict[str, list[str]] = {}
    for text in texts[ends:]:
        by_next.setdefault(text[at], []).append(text)
    parts = [_tail(group, at) for group in by_next.values()]
    if not parts:
        return ""
    together = parts[0] if len(parts) == 1 and not ends else f"(?:{'|'.join(parts)})"
    return f"{together}?" if ends else together


def _tail(texts: Sequence[str], at: int) -> str:
    """Returns the expression for sorted texts that also agree at `at`; their common part is written out."""
    upto = at + 1
    first, last = texts[0], texts[-1]  # of sorted texts, these two agree least
    while upto < min(len(first), len(last)) and first[upto] == last[upto]:
        upto += 1
    return re.escape(first[at:upto]) + _branches(texts, upto)


MAX_LINE_BYTES = 64 << 20
TOO_LONG = f"the line has more than {MAX_LINE_BYTES:,} bytes"


def numbered_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yields each line with its number, from 1, and its line ending.

    Yields None in place of a line longer than MAX_LINE_BYTES. Removes a byte order mark from the first line.
    """
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES):
        number += 1
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_LINE_BYTES)
            yield number, None
        else:
            yield number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw


def counted(n: int, noun: str) -> str:
    """Returns a count with its noun: "1 token", "2 tokens". The plural of `noun` must end in s."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def plain(number: float) -> str:
    """Returns a number as people write it: 0.000001 and 2, not 1e-06 and 2.0."""
    return format(Decimal(repr(number)).normalize(), "f")


def human_size(count: float) -> str:
    """Returns a number of bytes in words, in powers of 1000: "98 MB", "4.7 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def change(before: float, after: float, changed: bool) -> str:
    """Returns a figure before and after EM: "1.69 → 0.22", or one number if EM did nothing."""
    return f"{before:.2f} → {after:.2f}" if changed else f"{before:.2f}"


LONG = 600.0
"""Seconds. A run that may take longer says so before it begins."""


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def long_run(seconds: float, why: str, shorten: str) -> list[str]:
    """Two lines on a run that may take longer than `LONG`; none for a shorter one.

    `shorten`: the settings that help, as they are typed.
    """
    if seconds <= LONG:
        return []
    return [f"this run may take up to {duration(seconds)}: {why}", f"to shorten it, lower {shorten}"]
