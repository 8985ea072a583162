"""Self-consistency (arXiv 2203.11171): draws several answers and takes the most frequent result."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from emlocal.answers import Extraction
from emlocal.errors import UsageError
from emlocal.methods.method import Answering, Method, Outcome
from emlocal.settings import SamplingParams, setting

if TYPE_CHECKING:
    from emlocal.methods.asking import Question

_SAMPLES = 8  # default number of samples
_LONGEST = 40  # maximum number of characters of an answer in a line for people


@dataclass(frozen=True)
class SelfConsistency(Method):
    """`self-consistency:N` lets N answers vote."""

    name: ClassVar[str] = "self-consistency"
    collects: ClassVar[bool] = True
    votes: ClassVar[bool] = True
    value: ClassVar[str] = "samples"

    extraction: Extraction | None = setting(None, "--extract", help="Vote on this part of each answer.")
    """None: the content of the last box, or else the last number."""
    pattern: str | None = setting(
        None,
        "--extract-pattern",
        help="Vote on the first group of this pattern (--extract regex).",
        metavar="REGEX",
    )

    def __post_init__(self) -> None:
        if self.extraction == "regex" or self.pattern is not None:
            from emlocal.answers.finding import check_pattern

            check_pattern(self.extraction or "none", self.pattern)

    def samples(self, asked: int | None) -> int:
        if asked == 1:
            raise UsageError(
                "--samples is 1; self-consistency needs at least 2 to vote", "set a larger --samples"
            )
        return asked or _SAMPLES

    def answer(self, question: "Question") -> Answering:
        from emlocal.answers.meaning import equivalent, majority  # imported late: it compiles many patterns

        [done] = yield [question.job()]
        answers = [self._found(completion.text) for completion in done.completions]
        winner = majority(answers)
        if winner is None:
            said = [without_answers(len(answers))]
            none = {"answer": None, "votes": 0}
            return Outcome([done], done.completions, fields=none, undecided=True, said=said)
        chosen = answers[winner] or ""
        votes = sum(equivalent(answer, chosen) for answer in answers if answer)
        fields = {"answer": chosen, "votes": votes}
        said = [f"answer {shortened(chosen)}{self._read_as(done.completions[winner].text)}"]
        said += [f"{votes} of {len(answers)} agree"]
        return Outcome([done], done.completions, winner, fields, confidence=votes / len(answers), said=said)

    def _read_as(self, text: str) -> str:
        """Returns how the answer was found if that was a guess: any text with a number has an answer."""
        from emlocal.answers.finding import find

        found = find(text) if self.extraction is None else None
        if found is None or found.how != "last-number" or found.text == text.strip():
            return ""
        return " (the last number of its text)"

    def _found(self, text: str) -> str | None:
        from emlocal.answers.finding import extract, find

        if self.extraction is not None:
            return extract(text, self.extraction, self.pattern)
        found = find(text)
        return None if found is None else found.text

    def describe(self, samples: int) -> list[str]:
        return [f"majority of {samples}"]

    def check(self, params: SamplingParams) -> None:
        if params.temperature == 0:
            raise UsageError("greedy samples are all alike and cannot vote")


def without_answers(samples: int) -> str:
    """Returns the remark on a vote that no sample takes part in."""
    return f"none of {samples} has an answer to vote on"


def shortened(answer: str) -> str:
    """Returns an answer for a line for people."""
    line = " ".join(answer.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
