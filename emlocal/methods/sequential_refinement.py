"""Sequential refinement: asks the model to revise its answer a few times."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from emlocal.errors import CancelledError, ContextFullError, EmlocalError, UsageError
from emlocal.methods.method import Answering, Method, Outcome
from emlocal.settings import check_settings, setting
from emlocal.text import counted

if TYPE_CHECKING:
    from emlocal.methods.asking import Question

REVISE = (
    "Check your answer above step by step. If you find a mistake, correct it. Then give the complete, final"
    " answer in the same form."
)
"""The request for a revision. The authors' code has none: it repeats the prompt."""


@dataclass(frozen=True)
class SequentialRefinement(Method):
    """`sequential-refinement:N` revises N times."""

    name: ClassVar[str] = "sequential-refinement"
    collects: ClassVar[bool] = True
    value: ClassVar[str] = "rounds"

    rounds: int = setting(2, "--rounds", 1, 100, "Set the number of revisions (sequential-refinement).")

    def __post_init__(self) -> None:
        check_settings(self)

    def samples(self, asked: int | None) -> int:
        if (asked or 1) > 1:
            raise UsageError(
                "--samples and --method sequential-refinement contradict each other", "leave one of them out"
            )
        return 1

    def answer(self, question: "Question") -> Answering:
        rounds = [*(yield [question.job()])]
        for number in range(1, self.rounds + 1):
            question = question.then(rounds[-1].completions[0].text, REVISE)
            try:
                job = question.job(round=number)
            except EmlocalError:  # the template refuses the longer conversation
                break
            try:
                [revision] = yield [job]
            except (ContextFullError, CancelledError):  # the context is full, or the user cancelled
                break
            if revision.completions[0].finish_reason == "cancelled":
                break
            rounds.append(revision)
        drafts = [done.completions[0].text for done in rounds] if len(rounds) > 1 else ()
        return Outcome(rounds, rounds[-1].completions, drafts=drafts)

    def describe(self, samples: int) -> list[str]:
        return [counted(self.rounds, "revision")]
