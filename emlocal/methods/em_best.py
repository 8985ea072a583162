"""The method em-best: chooses the most certain of several answers.

It minimises entropy over whole answers, and suits texts on which nothing can vote.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from emlocal.em.scores import RANKED, Scores
from emlocal.errors import UsageError
from emlocal.methods.method import Answering, Method, Outcome
from emlocal.methods.vote import DRAWN_WITH, SCORE_HELP
from emlocal.methods.voting import Score, is_whole, repeated
from emlocal.settings import SamplingParams, check_settings, setting

if TYPE_CHECKING:
    from emlocal.methods.asking import Question

SCORE: Score = "mean-entropy"
_SAMPLES = 8  # default number of samples


@dataclass(frozen=True)
class EMBest(Method):
    """`em-best:N` takes the answer with the lowest entropy among N."""

    name: ClassVar[str] = "em-best"
    collects: ClassVar[bool] = True
    sampling: ClassVar[Mapping[str, float]] = DRAWN_WITH
    value: ClassVar[str] = "samples"

    score: Score | None = setting(None, "--score", help=SCORE_HELP)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.score == "none":
            raise UsageError("em-best needs a score to choose by; --score is none", f"use --score {SCORE}")

    def params(self, given: SamplingParams, chosen: frozenset[str] = frozenset()) -> SamplingParams:
        params = super().params(given, chosen)
        self.check(params)
        return params

    def samples(self, asked: int | None) -> int:
        if asked == 1:
            raise UsageError(
                "--samples is 1; em-best needs at least 2 to choose among", "set a larger --samples"
            )
        return asked or _SAMPLES

    def answer(self, question: "Question") -> Answering:
        from emlocal.methods.scoring import scores_of

        [done] = yield [question.job()]
        score = self.score or SCORE
        whole = [
            is_whole(c.finish_reason, repeated(c.tokens)) and bool(c.text.strip()) for c in done.completions
        ]
        index = surest([scores_of(c) for c in done.completions], whole, score)
        said = f"the most certain of {len(whole)} by {score}"
        if sum(whole) < len(whole):
            said += f", {sum(whole)} of them whole"
        fields = {"chosen_by": score, "drawn": len(whole), "whole": sum(whole)}
        return Outcome([done], done.completions, index, fields, said=[said])

    def describe(self, samples: int) -> list[str]:
        return [f"the most certain of {samples} by {self.score or SCORE}"]

    def check(self, params: SamplingParams) -> None:
        if params.temperature == 0:
            raise UsageError("greedy samples are all alike, so em-best cannot choose")


def surest(scores: Sequence[Scores | None], whole: Sequence[bool], score: str = SCORE) -> int:
    """Returns the index of the most certain answer, or of the first of equal ones.

    A text that loops is very certain, and one that was cut off has not reached the hard part. So answers that
    are not whole are considered only if there are no others.

    Args:
        scores: of each answer; None for one without tokens.
        score: a name of `RANKED`.
    """

    def rank(index: int) -> tuple[bool, float]:
        found = scores[index]
        return whole[index], -float("inf") if found is None else RANKED[score](found)

    return max(range(len(scores)), key=rank)
