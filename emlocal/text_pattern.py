"""A pattern for many fixed texts at once."""

import re
from collections.abc import Iterable, Sequence


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
