"""Where the answer of a text is: in its last box, else its last number."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from emlocal.answers import Extraction
from emlocal.errors import UsageError

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)

# Bounded and atomic: each run of digits is read a fixed number of times, however hostile the text.
_DIGITS = r"(?>[0-9]{1,3}(?:(?:,|\{,\}|,\\!)[0-9]{3}){1,12}(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?>{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_LATEX_FRACTION = r"\\[dt]?frac\{[0-9]{1,99}\}\{[0-9]{1,99}\}"
_NUMERAL = (
    r"(?>(?:(?<![\w)}\]])[-−+])?(?:\\?\$)?(?<![A-Za-z0-9_])"
    rf"(?>{_LATEX_FRACTION}|{_DECIMAL}(?:[eE][-+]?[0-9]+)?(?:/{_DECIMAL})?)(?:\\?%)?)"
)
_NUMBER = re.compile(_NUMERAL)
_GSM8K = re.compile(rf"####[ \t]*({_NUMERAL})(?![ \t]*[.):][ \t]*\w)")  # not a heading's own number


def check_pattern(how: "Extraction", pattern: str | None) -> None:
    """Raise `UsageError` unless there is a pattern exactly where one is used, and it compiles."""
    if how != "regex":
        if pattern is not None:
            message = f"--extract-pattern has no use with --extract {how}"
            raise UsageError(message, "say --extract regex, or leave the pattern out")
        return
    if pattern is None:
        raise UsageError("--extract regex needs a pattern", "give one: --extract-pattern 'answer: (.+)'")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--extract-pattern {pattern!r} is no regular expression: {error}") from error


def extract(text: str, how: "Extraction", pattern: str | None = None) -> str | None:
    """The answer in a completion, stripped; None where there is none, or an empty one.

    `boxed`: what the last \\boxed or \\fbox holds. One that is not closed was cut off, and earlier boxes do
    not stand in for it. `last-number`: the number of the last "#### 18", else the last number, with $ or %.
    `regex`: the first group that took part in the pattern's last match, else that match. `none`: all of it.
    """
    if how == "boxed":
        found = _boxed(text)
    elif how == "last-number":
        found = _last_number(text)
    elif how == "regex":
        check_pattern(how, pattern)
        found = _matched(text, pattern or "")
    else:
        found = text
    return (found or "").strip() or None


How = Literal["boxed", "last-number"]


@dataclass(frozen=True)
class Found:
    """An answer in a text."""

    text: str
    """What the answer is."""
    how: How
    start: int
    """Where it stands: text[start:end]."""
    end: int


def find(text: str) -> Found | None:
    """The answer of a text that was asked for a box, and how it was found: what the last \\boxed holds; where
    there is no box the last number. A box that was cut off holds no answer, and no number in it is one.
    """
    boxed, box = extract(text, "boxed"), _last_box(text)
    if boxed is not None:
        start = text.index(boxed, box)
        return Found(boxed, "boxed", start, start + len(boxed))
    if box is not None and text[box : box + 1] == "{" and _boxed(text) is None:
        return None
    number = extract(text, "last-number")
    if number is None:
        return None
    start = text.rindex(number)
    return Found(number, "last-number", start, start + len(number))


def _last_box(text: str) -> int | None:
    """Where the last box's content begins, its brace included."""
    start = None
    for box in _BOX.finditer(text):
        start = box.end()
    return start


def _boxed(text: str) -> str | None:
    start = _last_box(text)
    if start is None:
        return None
    if text[start : start + 1] != "{":
        return re.split(r"[\s$]", text[start:], maxsplit=1)[0].rstrip(".,;")
    depth = 0
    for brace in _BRACES.finditer(text, start):  # an escaped brace opens nothing
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()]
    return None


def _last(matches: Iterable[re.Match[str]]) -> re.Match[str] | None:
    last = None
    for match in matches:
        last = match
    return last


def _last_number(text: str) -> str | None:
    if marked := _last(_GSM8K.finditer(text)):
        return marked[1]
    last = _last(_NUMBER.finditer(text))
    return last[0] if last else None


def _matched(text: str, pattern: str) -> str | None:
    last = _last(re.finditer(pattern, text))
    if last is None:
        return None
    return next((group for group in last.groups() if group is not None), last[0])
