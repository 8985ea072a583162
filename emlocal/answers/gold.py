"""Gold answers, and whether an answer equals one: the same for rewards, validation and judges.

A gold answer stands by itself, such as `(1, 2)` or `6 \\sqrt{5}`, or in a text: GSM8K's after ####, Minerva's
in its solution's last box.
"""

import re
from collections.abc import Hashable

from emlocal.answers.finding import find
from emlocal.answers.meaning import canonical

_SAID = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?answer(?: is:?|:) ?", re.I
)
_WORD = re.compile(r"(?<![A-Za-z\\{])[A-Za-z]{2,}")
_VERBS = frozenset(
    ["is", "are", "was", "were", "has", "have", "had", "equals", "gets", "so", "thus", "therefore"]
)
_FEWEST_WORDS = 3


def gold(text: str) -> str | None:
    """Returns the answer that a label is, or contains; None if it is empty.

    It is the text after "####" in its last line; otherwise the content of the last box; otherwise the text
    that "The answer is" announces; in a sentence of words the last number; otherwise the whole label.
    """
    _, mark, end = text.rpartition("####")
    boxed = find(text, "boxed")
    if mark and boxed is None:
        end = end.strip()
        number = find(text, "last-number")
        if end and "\n" not in end:
            return end
        return number.text if number else None
    if boxed is not None:
        return boxed.text
    text = text.strip()
    if said := _SAID.match(text):
        text = text[said.end() :].removesuffix(".").strip()
    elif _is_sentence(text) and (number := find(text, "last-number")):
        return number.text
    return text.strip("$").strip() or None


def _is_sentence(text: str) -> bool:
    words = [word.lower() for word in _WORD.findall(text)]
    return len(words) >= _FEWEST_WORDS and not _VERBS.isdisjoint(words)


def answer_of(text: str) -> Hashable | None:
    """Returns a key that texts with equivalent answers share; None without an answer (`finding.find`)."""
    found = find(text)
    return None if found is None else canonical(found.text)


def label_of(label: str) -> Hashable | None:
    """Returns the same key for a label (`gold`)."""
    text = gold(label)
    return None if text is None else canonical(text)


def is_right(text: str, label: str) -> bool:
    """Returns whether a text's answer is the label's, as far as `canonical` can tell: without algebra."""
    found = answer_of(text)
    return found is not None and found == label_of(label)
