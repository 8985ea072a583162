"""Equivalence of answers: whether two answers mean the same.

`canonical` maps an answer to a key, and answers are equivalent if their keys are equal. So equivalence is
transitive, and votes can be counted. Where conventions differ, it decides:

- A percent sign, a currency and a unit are labels: 50% = 50 (not 1/2), $18 = 18, 5 cm = 5 m = 5. The gold
  answers of GSM8K and MATH include or omit them at will. (Clock times keep am and pm; millions count.)
- A list without brackets and a {set} have no order; (tuples) and [intervals) have one, and keep their
  brackets.
- Commas separate the elements within brackets, (100,200); without brackets 100,200 is one number.
- Sums are equal in any order of their terms. There is no other algebra: \\sqrt{8} is not 2\\sqrt{2}.

Nothing is evaluated, and no integer longer than `LONGEST_NUMERAL` digits is built: longer numbers, and any
answer longer than `LONGEST_ANSWER`, are compared as texts.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

from emlocal.answers.notation import plain, without_unit

LONGEST_ANSWER = 1000
LONGEST_NUMERAL = 200
DEEPEST = 8  # brackets within brackets that are compared element by element


def equivalent(a: str, b: str) -> bool:
    """Returns whether two answers mean the same, as far as `canonical` can tell."""
    return canonical(a) == canonical(b)


def majority(answers: Sequence[str | None]) -> int | None:
    """Returns the index of the first member of the largest class of equivalent answers.

    On a tie, the earliest class wins. None does not vote; without any vote the index is None.
    """
    first: dict[Hashable, int] = {}
    votes: Counter[Hashable] = Counter()
    for index, answer in enumerate(answers):
        if answer is not None:
            key = canonical(answer)
            first.setdefault(key, index)
            votes[key] += 1
    return first[max(votes, key=votes.__getitem__)] if votes else None  # max: the earliest of equals


def canonical(answer: str) -> Hashable:
    """Returns a key that equivalent answers share."""
    text = " ".join(answer.split())
    if len(text) > LONGEST_ANSWER:
        return "text", text
    return _whole(plain(text), 0)


# ---------------------------------------------------------------------------------------------------- keys

_DEC = r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_POWER = re.compile(rf"([-+]?) ?(?:{_DEC} ?\* ?)?10\^([-+]?[0-9]+)")
_RATIONAL = re.compile(rf"([-+]?) ?(?:([0-9]+) )?{_DEC}(?:[eE]([-+]?[0-9]+))?(?: ?/ ?([-+]?){_DEC})?")
_TWICE_NEGATIVE = re.compile(r"^- ?- ?")
_COMMA = re.compile(r",")
_LIST_COMMA = re.compile(  # or a number with commas in it, which is skipped
    r"(?<![0-9.])(?<![0-9],)[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])|,"
)
_CUP = re.compile(r"\\cup(?![A-Za-z])")
_SIGN = re.compile(r"(?<=[^\^*/_+-])[-+]")
_NAME = re.compile(r"((?:[A-Za-z]|\\[a-z]+)(?:_\w)?(?:\([A-Za-z]\))?) ?(?:=|\\in(?![A-Za-z]))(?=[^=]*$)")
_PLUS_MINUS = re.compile(r"(?=[^,⟦]*$).*\\pm(?![A-Za-z])")
_RELATION = re.compile(r"[=<>]|\\(?:leq|geq|neq|in|pm|mp|equiv)(?![A-Za-z])")
_WORDS = re.compile(r"[A-Za-z]|[A-Za-z]{2,}(?:[ '-][A-Za-z]+)*")


def _whole(text: str, depth: int) -> Hashable:
    """Returns the key of an answer that may be a list, and may have a name (`x = 5`)."""
    elements = _both_signs(_unnamed(list(_parts(text, _LIST_COMMA))))
    if len(elements) == 1:
        return _element(elements[0], depth)
    return "list", _unordered(_element(element, depth + 1) for element in elements)


def _element(text: str, depth: int) -> Hashable:
    text = text.strip()
    if depth > DEEPEST:
        return "text", text
    united = list(_parts(text, _CUP))
    if len(united) > 1:
        return "union", frozenset(_element(part, depth + 1) for part in united)
    if text.endswith((")", "]", "⟧")) and (opening := re.match(r"\\matrix\(|[(\[⟦]", text)):
        inside = text[opening.end() : -1]
        if _is_balanced(inside):
            return _bracketed(opening[0], inside, text[-1], depth + 1)
    number = _number(text)
    if number is None:
        number = _number(without_unit(text))  # a unit within an element: 3 m, 4 m
    if number is not None:
        return "number", number
    if _WORDS.fullmatch(text):
        return "words", text.casefold()
    return _expression(text)


def _bracketed(opening: str, inside: str, closing: str, depth: int) -> Hashable:
    if opening == "\\matrix(":
        rows = inside.strip(" ;").split(";")
        return "matrix", tuple(tuple(_element(cell, depth) for cell in row.split("&")) for row in rows)
    parts = list(_parts(inside, _COMMA))
    if opening == "⟦" and closing == "⟧":
        return "list", _unordered({_element(part, depth) for part in _both_signs(parts)})
    if len(parts) == 1 and (opening, closing) == ("(", ")"):
        return _element(inside, depth)
    return opening, tuple(_element(part, depth) for part in parts), closing


def _expression(text: str) -> Hashable:
    """Returns the key of an expression: its terms without order; an equation or inequality unchanged."""
    text = re.sub(r" ?\* ?", "*", text)
    text = re.sub(r"(?<![0-9])[ *]+|[ *]+(?![0-9])", "", text)  # those between digits stay
    if _RELATION.search(text):
        return "text", text
    cuts = [0, *(sign.start() for sign in _outside(text, _SIGN)), len(text)]
    terms = [text[a:b].removeprefix("+") for a, b in pairwise(cuts)]
    numbers = [_number(term) for term in terms]
    return "sum", _unordered(t if n is None else n for t, n in zip(terms, numbers, strict=True))


def _number(text: str) -> Fraction | None:
    """Returns the rational number that the text writes; None if it is not one, or too long to build."""
    if len(text) > LONGEST_NUMERAL:
        return None
    text = _TWICE_NEGATIVE.sub("", text)
    if power := _POWER.fullmatch(text):
        sign, decimal, exponent = power.groups()
        return _scaled(sign + (decimal or "1"), exponent)
    if not (rational := _RATIONAL.fullmatch(text)):
        return None
    sign, whole, decimal, exponent, under_sign, under = rational.groups()
    value = _scaled(decimal, exponent or "0")
    if value is None:
        return None
    if under is not None:
        divisor = _scaled(under_sign + under, "0")
        if not divisor:
            return None
        value /= divisor
    if whole is not None:  # a mixed number; `2 3` and `2 7/3` are not
        if under is None or not 0 <= value < 1:
            return None
        value += int(whole)
    return -value if sign == "-" else value


def _scaled(decimal: str, exponent: str) -> Fraction | None:
    power = int(exponent)
    if abs(power) > LONGEST_NUMERAL:
        return None
    return Fraction(decimal.replace(",", "").rstrip(".")) * Fraction(10) ** power


def _unordered(keys: Iterable[Hashable]) -> Hashable:
    return frozenset(Counter(keys).items())


def _unnamed(parts: list[str]) -> list[str]:
    """Removes the one name that the values have: `x = 1, x = 2` is `1, 2`; `x = 1, y = 2` stays."""
    parts = [part.strip() for part in parts]
    named = [_NAME.match(part) for part in parts]
    if named[0] is None or len({name[1] for name in named if name}) > 1:
        return parts
    return [part[name.end() :] if name else part for part, name in zip(parts, named, strict=True)]


def _both_signs(parts: list[str]) -> list[str]:
    """Replaces `1 \\pm x` by `1 + x` and `1 - x`; sets and tuples handle their own elements."""
    signs = [("+", "-") if _PLUS_MINUS.match(part) else (r"\pm",) for part in parts]
    return [part.replace(r"\pm", sign) for part, both in zip(parts, signs, strict=True) for sign in both]


def _parts(text: str, separator: re.Pattern[str]) -> Iterator[str]:
    """Yields the text between separators outside brackets.

    A match of `separator` that begins with a digit does not count.
    """
    start = 0
    for found in _outside(text, separator):
        if not found[0][0].isdigit():
            yield text[start : found.start()]
            start = found.end()
    yield text[start:]


def _outside(text: str, token: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Yields the token's matches outside all brackets; `(0, 1]` closes as well as `(0, 1)`."""
    depth = 0
    for found in re.finditer(rf"[(\[⟦]|[)\]⟧]|{token.pattern}", text):
        if found[0] in ("(", "[", "⟦"):
            depth += 1
        elif found[0] in (")", "]", "⟧"):
            depth -= 1
        elif depth == 0:
            yield found


def _is_balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char in "([⟦") - (char in ")]⟧")
        if depth < 0:
            return False
    return depth == 0
