r"""Finds the answer in a text: in its last boxes, otherwise its last number; never among its thoughts.

Every search takes time in proportion to the text, however hostile it is.
"""

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from emlocal.answers import Extraction
from emlocal.answers.meaning import canonical
from emlocal.errors import UsageError


@dataclass(frozen=True)
class Found:
    """An answer in a text."""

    text: str
    """The answer: text[start:end], or the contents of several boxes, with commas between them."""
    how: Extraction
    start: int
    end: int


# ------------------------------------------------------------------------------------------------- thoughts

_OPENS = re.compile(r"<think(?:ing)?>|\[THINK\]|<\|channel\|>(?:analysis|commentary)|<\|channel>thought")
_CLOSES = re.compile(r"</think(?:ing)?>|\[/THINK\]|<\|channel\|>final[^<\n]{0,40}<\|message\|>|<channel\|>")
"""Ends of thoughts: of most models; Magistral; gpt-oss (harmony); Gemma 4.

gpt-oss has a channel of its own for the answer.
"""


def answer_start(text: str) -> int | None:
    """Returns where a model's thoughts end and its answer begins; None if the thoughts have no end.

    A prompt may have opened the thoughts, so that the text only closes them.
    """
    closed = last(_CLOSES.finditer(text))
    start = closed.end() if closed else 0
    return None if _OPENS.search(text, start) else start


# -------------------------------------------------------------------------------------------------- numbers

# Bounded and atomic: each run of digits is read a fixed number of times, however hostile the text.
_DIGITS = r"(?>[0-9]{1,3}(?:(?:,|\{,\}|,\\!)[0-9]{3}){1,12}(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?>{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_SUPERSCRIPT = "[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,9}"
_EXPONENT = (
    rf"(?> ?\^ ?(?>\{{ ?[-+−]?[0-9]{{1,9}} ?\}}|\([-+−]?[0-9]{{1,9}}\)|[-+−]?[0-9]{{1,9}})|{_SUPERSCRIPT})"
)
_HALF = "[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]"
_OVER = r"(?>\{ ?-?[0-9.,]{1,99} ?\}|[0-9])"
_LATEX_FRACTION = rf"\\[dtc]?frac ?{_OVER} ?{_OVER}"
_PART = rf"(?>{_LATEX_FRACTION}|{_HALF}|(?<= )[0-9]{{1,9}}/[0-9]{{1,9}}(?![0-9/]|\.[0-9]))"
_TIMES = r"(?> ?(?>[×xX*·⋅]|\\times|\\cdot) ?)"
_NUMERAL = (
    r"(?>(?:(?<![\w)}\]])[-−+])?(?:\\?\$|[€£¥₹₩])?(?<![A-Za-z0-9_])"
    rf"(?>{_LATEX_FRACTION}|{_HALF}|[0-9]{{1,15}}(?: | ?(?=\\[dtc]?frac)|(?=[^ -~])){_PART}"
    rf"|{_DECIMAL}(?>{_TIMES}10{_EXPONENT}|{_EXPONENT}|[eE][-+]?[0-9]+(?:/{_DECIMAL})?|/{_DECIMAL}|"
    r"_(?>\{[0-9]{1,2}\}|[0-9]{1,2}))?)"
    r"(?: (?:hundred|thousand|million|billion|trillion)(?![A-Za-z]))?(?:\\?%)?)"
)
_SKIPPED = r"(?:_|\^ ?)(?>\{[^{}]{0,99}\}|\([^()]{0,99}\)|[-+−]?[0-9]+)"
"""Exponents and indices of names: x^2 has no number in it."""
_NUMBER = re.compile(rf"{_SKIPPED}|({_NUMERAL})")
_GSM8K = re.compile(rf"####[ \t]*({_NUMERAL})(?![ \t]*[.):][ \t]*\w)")  # not a heading's own number


# ---------------------------------------------------------------------------------------------------- boxes

# \\. matches an escaped brace, which does not count.
_TOKEN = re.compile(r"\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*\{?|\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"[^\s$]*")
_JUNK = (
    r"(?:[\s$,;&*}]|\\[,;:!\\()\[\] ]|\\q?quad(?![A-Za-z])|(?:and|or)(?![A-Za-z])|[A-Za-z](?:_\{?\w\}?)? ?="
    r"|\\(?:text|mbox|textrm|mathrm) ?\{\s*,?\s*(?:and|or)?,?\s*\})*"
)
_JOINT = re.compile(rf"{_JUNK}|([A-Za-z()'\s$\\{{}}-]*)(?:[,;]|(?<![A-Za-z])(?:and|or)(?![A-Za-z])){_JUNK}")
_CORRECTION = re.compile(
    r"\b(?:wait|no|not|but|actually|instead|rather|so|then|thus|hence|therefore|is)\b", re.I
)
"""Words before a box that make it a correction, not a part of one answer.

`_JOINT` is the text that may stand between boxes of one answer: "and", or as in "\\boxed{1} red and
\\boxed{2} blue".
"""
_LONGEST_JOINT = 60
_MOST_BOXES = 32


class _Box(NamedTuple):
    """Where \\boxed stands, and where its content begins and ends (-1: it was cut off)."""

    at: int
    start: int
    end: int


def _boxes(text: str) -> list[_Box]:
    boxes: list[_Box] = []
    opened: list[int | None] = []  # for each open brace, the box that it belongs to
    for token in _TOKEN.finditer(text):
        if token[0][-1] == "}" and len(token[0]) == 1:
            box = opened.pop() if opened else None
            if box is not None:
                boxes[box] = boxes[box]._replace(end=token.start())
        elif token[0] == "{":
            opened.append(None)
        elif "box" in token[0]:
            start = token.end()
            if token[0][-1] == "{":
                opened.append(len(boxes))
                boxes.append(_Box(token.start(), start, -1))
            elif content := _UNBRACED.match(text, start):  # \boxed 5
                boxes.append(_Box(token.start(), start, start + len(content[0].rstrip(".,;"))))
    return boxes


def _boxed(text: str, boxes: Sequence[_Box]) -> Found | None:
    """Returns the content of the last box, and of those joined with it: "\\boxed{1} and \\boxed{2}"."""
    if not boxes or boxes[-1].end < 0:
        return None
    group = [boxes[-1]]
    for box in reversed(boxes[-_MOST_BOXES:-1]):
        if not 0 <= box.end <= group[0].at <= box.end + _LONGEST_JOINT:
            break
        joint = _JOINT.fullmatch(text, box.end, group[0].at)
        if joint is None or _CORRECTION.search(joint[1] or ""):
            break
        group.insert(0, box)
    contents: dict[Hashable, str] = {}
    for box in group:
        content = text[box.start : box.end].strip()
        if content:
            contents.setdefault(canonical(content), content)
    return _found(text, ", ".join(contents.values()), "boxed", group[0].start, group[-1].end)


# ---------------------------------------------------------------------------------------------------- texts


def find(text: str, how: Extraction | None = None, pattern: str | None = None) -> Found | None:
    """Returns the answer in a text; None if there is none, or an empty one.

    It is looked for after the model's thoughts (`answer_start`). `how` is

    - None, for a text that was asked for a box: the content of the last box; without a box the last number. A
      box that was cut off has no answer, and no number in it counts.
    - `boxed`: the content of the last \\boxed or \\fbox. One that is not closed was cut off, and earlier
      boxes do not replace it. Boxes that a comma, "and" or "or" joins count together.
    - `last-number`: the number of the last "#### 18", otherwise the last number, with $ or %, its power of
      ten or its fraction. No exponent or index counts.
    - `regex`: the first group that took part in the pattern's last match, otherwise that match. `none`: the
      whole text.

    Raises UsageError for a pattern that `check_pattern` refuses.
    """
    start = answer_start(text)
    if start is None:
        return None
    found = _find(text[start:], how, pattern)
    return found and replace(found, start=found.start + start, end=found.end + start)


def extract(text: str, how: Extraction, pattern: str | None = None) -> str | None:
    """Returns the text of the answer that `find` finds."""
    found = find(text, how, pattern)
    return found.text if found else None


def _find(text: str, how: Extraction | None, pattern: str | None) -> Found | None:
    if how is None or how == "boxed":
        boxes = _boxes(text)
        found = _boxed(text, boxes)
        if found is not None or how == "boxed" or (boxes and boxes[-1].end < 0):
            return found
        how = "last-number"
    if how == "last-number":
        number = last(_GSM8K.finditer(text))
        number = number or last(match for match in _NUMBER.finditer(text) if match[1])
        return number and _found(text, number[1], how, *number.span(1))
    if how == "regex":
        check_pattern(how, pattern)
        match = last(re.finditer(pattern or "", text))
        if match is None:
            return None
        group = next((i for i, one in enumerate(match.groups(), 1) if one is not None), 0)
        return _found(text, match[group].strip(), how, *match.span(group))
    return _found(text, text.strip(), how, 0, len(text))


def _found(text: str, answer: str, how: Extraction, start: int, end: int) -> Found | None:
    """Returns the answer, with its place without the spaces around it; None for an empty answer."""
    inside = text[start:end]
    start, end = end - len(inside.lstrip()), start + len(inside.rstrip())
    return Found(answer, how, start, end) if answer else None


def last(matches: Iterable[re.Match[str]]) -> re.Match[str] | None:
    """Returns the last of the matches; None if there is none."""
    found = None
    for match in matches:
        found = match
    return found


def check_pattern(how: Extraction, pattern: str | None) -> None:
    """Raises UsageError unless a pattern is given exactly when it is used, and compiles."""
    if how != "regex":
        if pattern is not None:
            message = f"--extract-pattern has no effect with --extract {how}"
            raise UsageError(message, "use --extract regex, or leave the pattern out")
        return
    if pattern is None:
        raise UsageError("--extract regex needs a pattern", "add one: --extract-pattern 'answer: (.+)'")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--extract-pattern {pattern!r} is not a regular expression: {error}") from error
