"""The scores of a finished answer: its draws' entropies and probabilities, and which tokens are the answer
proper."""

import re
from bisect import bisect_left
from collections.abc import Sequence

from emlocal.em.scores import Scores, scores
from emlocal.generation import Completion
from emlocal.methods.extraction import find_answer

Span = tuple[int, int]
"""Characters of a text: the first, and the one behind the last."""
_FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def scores_of(completion: Completion) -> Scores | None:
    """The scores of an answer; None where it was cancelled before its first token."""
    draws = completion.draws
    if not draws:
        return None
    span = answer_span(completion.text)
    own = None if span is None else tokens_of(completion.ends, span)
    return scores([draw.entropy_before for draw in draws], [draw.p_before for draw in draws], own)


def scores_json(completion: Completion) -> dict[str, float | int | None] | None:
    """The same for output files."""
    found = scores_of(completion)
    return None if found is None else found.as_json()


def tokens_of(ends: Sequence[int], span: Span) -> slice:
    """The tokens that wrote these characters, those that wrote only a part of them included.

    Args:
        ends: `Completion.ends`.
        span: not empty.
    """
    first, behind = span
    start = 0 if first == 0 else bisect_left(ends, first)
    if first and start < len(ends) and ends[start] == first:  # its characters end before the span
        start += 1
    return slice(start, min(len(ends), bisect_left(ends, behind) + 1))


def answer_span(text: str) -> Span | None:
    """Where the answer proper stands: what the last box holds, else the last block of code, else the last
    number; None where there is none of them."""
    found = find_answer(text)
    if found is not None and found[1] == "boxed":
        start = text.index(found[0], max(text.rfind("\\boxed"), text.rfind("\\fbox")))
        return start, start + len(found[0])
    blocks = [block.span(1) for block in _FENCED.finditer(text) if block[1].strip()]
    if blocks:
        return blocks[-1]
    if found is None:
        return None
    start = text.rindex(found[0])
    return start, start + len(found[0])
