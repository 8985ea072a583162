"""What an answer's text comes to, and whether that is the right one."""

from collections.abc import Hashable

from emlocal.methods.extraction import canonical, extract, find_answer


def answer_of(text: str) -> Hashable | None:
    """A key that texts with equivalent answers share; None where there is none (`find_answer`)."""
    found = find_answer(text)
    return None if found is None else canonical(found[0])


def label_of(text: str) -> Hashable | None:
    """The same of a label: of a sentence, such as GSM8K's, as of an answer; else it is one by itself."""
    text = text.strip()
    found = extract(text, "boxed")
    if found is None:  # a sentence ends with its number; \\frac{1}{2} is one by itself
        found = extract(text, "last-number") if " " in text or "\n" in text else None
    return canonical(found or text)


def is_right(text: str, label: str) -> bool:
    """Whether the answer in a text is the label's."""
    found = answer_of(text)
    return found is not None and found == label_of(label)
