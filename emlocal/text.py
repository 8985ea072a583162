"""Texts from anywhere: made whole, read as JSON without surprises, searched for many others at once.

Lines of a file from anywhere, one at a time and none longer than memory should bear.

Numbers and words in messages.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, BinaryIO

# A model may say anything, escape codes that repaint or retitle a terminal among it: not to a terminal.
CONTROLS = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def harmless(text: str) -> str:
    """A file's or a model's text in a form that any terminal takes: no escape codes, no half characters."""
    return text.translate(CONTROLS).encode(errors="replace").decode()


def well_formed(text: str) -> str:
    """The text with halves of characters joined where they are pairs, and U+FFFD for those that are alone.

    Python has such halves (surrogates) for bytes that are not UTF-8, and JSON can write them; no file takes
    them.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_json(raw: bytes | str) -> Any:
    """The value of a JSON text (bytes: UTF-8) that anybody may have written.

    Raises ValueError, and nothing else, with one line that says what is wrong: bytes that are not UTF-8, no
    JSON, nested too deeply, a number of thousands of digits.
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
    """A regular expression that matches the longest of these texts, in time that hardly grows with their
    number: they share their beginnings, as in `<\\|im_(?:end\\|>|start\\|>)`. It matches nothing for no
    texts."""
    return _branches(sorted({text for text in texts if text}), 0) or "(?!)"


def _branches(texts: Sequence[str], at: int) -> str:
    """What sorted texts, which agree before `at`, have from there on."""
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
    """The same of texts that agree in the character at `at` too: what they share is written out."""
    upto = at + 1
    first, last = texts[0], texts[-1]  # of sorted texts these two agree least
    while upto < min(len(first), len(last)) and first[upto] == last[upto]:
        upto += 1
    return re.escape(first[at:upto]) + _branches(texts, upto)


MAX_LINE_BYTES = 64 << 20
TOO_LONG = f"the line has more than {MAX_LINE_BYTES:,} bytes"


def numbered_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, the line with its end); None in place of one longer than MAX_LINE_BYTES.

    A byte order mark at the beginning is no part of the first line.
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
    """ "1 token", "2 tokens"; `noun` is one that takes an s."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def plain(number: float) -> str:
    """A number as people write it: 0.000001 and 2, not 1e-06 and 2.0."""
    return format(Decimal(repr(number)).normalize(), "f")


def human_size(count: float) -> str:
    """Bytes as people read them, in powers of 1000: "98 MB", "4.7 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def change(before: float, after: float, changed: bool) -> str:
    """A figure before and after EM: "1.69 → 0.22", or one number where EM did nothing."""
    return f"{before:.2f} → {after:.2f}" if changed else f"{before:.2f}"
