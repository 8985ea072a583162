"""Prints how readable the pages are: words, median sentence length and Flesch reading ease.

python docs/readability.py [PAGE.md ...]        (without pages: README.md and all of docs/; needs textstat)

Only prose counts. Code blocks, tables, headings, pictures and HTML comments are left out. A link counts as
its text, and code in a line as the one word "code". A list item or a paragraph ends a sentence. docs/style.md
has the targets.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import textstat

ROOT = Path(__file__).parents[1]
LONGEST, EASIEST = 16, 55
"""The targets: at most this many words in the median sentence, at least this Flesch reading ease."""

_BLOCK = re.compile(r"^ *```.*?^ *```$|<!--.*?-->", re.MULTILINE | re.DOTALL)
_LEFT_OUT = re.compile(r"^(?:\s*(?:\||#|!\[|---)| {4,}).*$", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_URL = re.compile(r"https?://\S+")
_CODE = re.compile(r"`[^`]*`")
_PART = re.compile(r"\n\s*(?:[-*]|\d+\.) |\n\s*\n")
_END = re.compile(r"(?<=[.!?])[)*\"”]*\s+(?=[\"“(*A-Z0-9])|:\n")
_WORD = re.compile(r"[^\W_]+(?:['’.,-][^\W_]+)*")


@dataclass(frozen=True)
class Reading:
    """How a text reads: its words of prose, median words a sentence, and Flesch reading ease (0 to 100)."""

    words: int
    sentence: float
    ease: float


def sentences(text: str) -> list[str]:
    """Returns the sentences of a page's prose."""
    text = _LEFT_OUT.sub("\n", _BLOCK.sub("\n\n", text))
    text = _CODE.sub("Code", _URL.sub("", _LINK.sub(r"\1", text)))
    parts = [" ".join(part.replace("*", "").split()) for part in _PART.split("\n" + text)]
    found = [one.strip() for part in parts for one in _END.split(part)]
    return [one for one in found if len(_WORD.findall(one)) > 1]


def reading(text: str) -> Reading:
    """Measures a page; the text is Markdown.

    Flesch (1948) with textstat's syllables, of the words that have a letter. textstat's own function takes
    the point of a decimal number for the end of a sentence.
    """
    found = sentences(text)
    lengths = [len(_WORD.findall(one)) for one in found]
    words = [word for one in found for word in _WORD.findall(one) if word.upper() != word.lower()]
    syllables = sum(textstat.syllable_count(word) for word in words)
    ease = 206.835 - 1.015 * len(words) / len(found) - 84.6 * syllables / len(words)
    return Reading(sum(lengths), median(lengths), ease)


def main(names: list[str]) -> None:
    pages = [Path(name) for name in names] or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    print(f"{'page':<24}{'words in all':>13}{'of prose':>9}{'a sentence':>11}{'Flesch':>8}")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        one = reading(text)
        fine = one.sentence <= LONGEST and one.ease >= EASIEST
        print(
            f"{page.name:<24}{len(text.split()):>13,}{one.words:>9,}{one.sentence:>11.1f}{one.ease:>8.1f}"
            + ("" if fine else "  misses the targets")
        )


if __name__ == "__main__":
    main(sys.argv[1:])
