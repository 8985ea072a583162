"""Gold answers, and whether an answer in a text is the gold one.

A gold answer is one by itself, or stands in a text: GSM8K's after ####, Minerva's in its solution's last box.
"""

from collections.abc import Hashable

from emlocal.answers.finding import extract, find
from emlocal.answers.meaning import canonical


def gold(text: str) -> str | None:
    """The answer that a label is or holds; None where it is empty."""
    marked = extract(text, "last-number") if "####" in text else None
    return marked or extract(text, "boxed") or text.strip("$").strip() or None


def answer_of(text: str) -> Hashable | None:
    """A key that texts with equivalent answers share; None where there is none (`finding.find`)."""
    found = find(text)
    return None if found is None else canonical(found.text)


def label_of(label: str) -> Hashable | None:
    """The same of a label (`gold`)."""
    text = gold(label)
    return None if text is None else canonical(text)


def is_right(text: str, label: str) -> bool:
    """Whether the answer in a text is the label's."""
    found = answer_of(text)
    return found is not None and found == label_of(label)
