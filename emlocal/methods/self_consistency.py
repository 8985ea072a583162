"""Self-consistency (arXiv 2203.11171): draw several answers, and take what most of them come to."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from emlocal.answers import Extraction
from emlocal.errors import UsageError
from emlocal.methods.method import Answering, Method, Outcome
from emlocal.settings import SamplingParams, setting

if TYPE_CHECKING:
    from emlocal.methods.asking import Question

_SAMPLES = 8  # where nobody says how many


@dataclass(frozen=True)
class SelfConsistency(Method):
    """`self-consistency:N` has N answers vote."""

    name: ClassVar[str] = "self-consistency"
    collects: ClassVar[bool] = True
    votes: ClassVar[bool] = True
    value: ClassVar[str] = "samples"

    extraction: Extraction | None = setting(None, "--extract", help="Vote on this part of each answer.")
    """None: "boxed", or the last number."""
    pattern: str | None = setting(
        None, "--extract-pattern", help="For --extract regex; its first group.", metavar="REGEX"
    )

    def __post_init__(self) -> None:
        if self.extraction == "regex" or self.pattern is not None:
            from emlocal.answers.finding import check_pattern

            check_pattern(self.extraction or "none", self.pattern)

    def samples(self, asked: int | None) -> int:
        if asked == 1:
            raise UsageError("--samples is 1; self-consistency needs at least 2 to vote")
        return asked or _SAMPLES

    def answer(self, question: "Question") -> Answering:
        from emlocal.answers.meaning import equivalent, majority  # many patterns, compiled on import

        [done] = yield [question.job()]
        answers = [self._found(completion.text) for completion in done.completions]
        winner = majority(answers)
        if winner is None:
            return Outcome([done], done.completions, fields={"answer": None, "votes": 0}, undecided=True)
        chosen = answers[winner] or ""
        votes = sum(equivalent(answer, chosen) for answer in answers if answer)
        fields = {"answer": chosen, "votes": votes}
        return Outcome([done], done.completions, winner, fields, confidence=votes / len(answers))

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
            raise UsageError("greedy samples are all alike, and cannot vote")
