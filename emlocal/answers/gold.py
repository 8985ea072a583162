"""Gold answers, and whether the answer in a text is the gold one: for rewards, validation and judges alike.

A gold answer is one by itself, `(1, 2)` and `6 \\sqrt{5}` among them, or it stands in a text: GSM8K's after
####, Minerva's in its solution's last box.
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
    """The answer that a label is, or holds; None where it is empty.

    What follows "####" in its last line; else what the last box holds; else what "The answer is" announces;
    of a sentence in words the last number; else all of it.
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
    """A key that texts with equivalent answers share; None where there is none (`finding.find`)."""
    found = find(text)
    return None if found is None else canonical(found.text)


def label_of(label: str) -> Hashable | None:
    """The same of a label (`gold`)."""
    text = gold(label)
    return None if text is None else canonical(text)


def is_right(text: str, label: str) -> bool:
    """Whether the answer in a text is the label's, as far as `canonical` can tell: no algebra is done."""
    found = answer_of(text)
    return found is not None and found == label_of(label)
