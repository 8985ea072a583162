"""Scores of a finished answer, from its draws' entropies and probabilities.

Some scores use only the tokens of the answer proper, such as the content of a box.
"""

from bisect import bisect_left
from collections.abc import Sequence

from emlocal.answers.finding import find
from emlocal.answers.programs import last_block
from emlocal.em.scores import Scores, scores
from emlocal.generation import Completion

Span = tuple[int, int]
"""Range of characters in a text: the first, and the one after the last."""


def scores_of(completion: Completion) -> Scores | None:
    """Returns the scores of an answer; None if it was cancelled before its first token."""
    draws = completion.draws
    if not draws:
        return None
    span = answer_span(completion.text)
    own = None if span is None else tokens_of(completion.ends, span)
    return scores([draw.entropy_before for draw in draws], [draw.p_before for draw in draws], own)


def scores_json(completion: Completion) -> dict[str, float | int | None] | None:
    """Returns the scores as an object for output files."""
    found = scores_of(completion)
    return None if found is None else found.as_json()


def tokens_of(ends: Sequence[int], span: Span) -> slice:
    """Returns the tokens that wrote these characters, including those that wrote only part of them.

    Args:
        ends: `Completion.ends`.
        span: not empty.
    """
    first, behind = span
    start = 0 if first == 0 else bisect_left(ends, first)
    if first and start < len(ends) and ends[start] == first:  # this token's characters end before the span
        start += 1
    return slice(start, min(len(ends), bisect_left(ends, behind) + 1))


def answer_span(text: str) -> Span | None:
    """Finds the answer proper in a text.

    It is the last box's content, else the last code block, else the last number. Returns None if there is
    none of these.
    """
    found = find(text)
    if found is not None and found.how == "boxed":
        return found.start, found.end
    code = last_block(text)
    if code is not None or found is None:
        return code
    return found.start, found.end
