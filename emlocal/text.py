"""Texts from anywhere: made whole, read as JSON without surprises, searched for many others at once."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

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
