"""What a person should know before reading the results of an evaluation, in words."""

from collections.abc import Mapping, Sequence

from emlocal.evaluation.answering import Judged
from emlocal.evaluation.results import MethodResult
from emlocal.text import counted

_MANY = 0.1
"""Share of answers that are cut off from which on it is said."""


def remarks(
    methods: Sequence[MethodResult], judged: Mapping[str, Sequence[Judged]], max_tokens: int
) -> list[str]:
    """Returns warnings: questions that did not fit, answers that are cut off, votes without an answer."""
    found = [
        f"{method.name}: {counted(method.errors, 'question')} did not fit the context; for a larger --context"
        " add --restart, or use another -o"
        for method in methods
        if method.errors
    ]
    cut = [
        f"{method.name} {method.cut_off:,} of {len(judged[method.name]):,}"
        for method in methods
        if method.cut_off >= _MANY * len(judged[method.name])
    ]
    if cut:
        found.append(
            f"many answers are cut off (--max-tokens {max_tokens:,}, or the context), and judged as they"
            f" stand: {', '.join(cut)}; for a larger --max-tokens add --restart, or use another -o"
        )
    undecided = [
        f"{name} {count:,} of {len(given):,}"
        for name, given in judged.items()
        if (count := sum(_is_undecided(one) for one in given))
    ]
    if undecided:
        found.append(
            f"votes in which no sample has an answer, so that one text was judged: {', '.join(undecided)}"
        )
    return found


def _is_undecided(judged: Judged) -> bool:
    """Whether the answer comes from a vote that found nothing to vote on."""
    row = judged.answer.row
    return "votes" in row and row.get("answer") is None
