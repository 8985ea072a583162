"""The surest of several answers: entropy minimization over whole answers, for texts that nothing can be voted
on."""

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
_SAMPLES = 8  # where nobody says how many


@dataclass(frozen=True)
class EMBest(Method):
    """`em-best:N` takes the answer of the lowest entropy among N."""

    name: ClassVar[str] = "em-best"
    collects: ClassVar[bool] = True
    sampling: ClassVar[Mapping[str, float]] = DRAWN_WITH
    value: ClassVar[str] = "samples"

    score: Score | None = setting(None, "--score", help=SCORE_HELP)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.score == "none":
            raise UsageError("--score none leaves em-best nothing to choose by", f"such as --score {SCORE}")

    def params(self, given: SamplingParams, chosen: frozenset[str] = frozenset()) -> SamplingParams:
        params = super().params(given, chosen)
        self.check(params)
        return params

    def samples(self, asked: int | None) -> int:
        if asked == 1:
            raise UsageError("--samples is 1; em-best needs at least 2 to choose among")
        return asked or _SAMPLES

    def answer(self, question: "Question") -> Answering:
        from emlocal.methods.scoring import scores_of

        [done] = yield [question.job()]
        score = self.score or SCORE
        whole = [
            is_whole(c.finish_reason, repeated(c.tokens)) and bool(c.text.strip()) for c in done.completions
        ]
        index = surest([scores_of(c) for c in done.completions], whole, score)
        said = f"the surest of {len(whole)} by {score}"
        if sum(whole) < len(whole):
            said += f", {sum(whole)} of them whole"
        fields = {"chosen_by": score, "drawn": len(whole), "whole": sum(whole)}
        return Outcome([done], done.completions, index, fields, said=[said])

    def describe(self, samples: int) -> list[str]:
        return [f"the surest of {samples} by {self.score or SCORE}"]

    def check(self, params: SamplingParams) -> None:
        if params.temperature == 0:
            raise UsageError("greedy samples are all alike, and none is the surest")


def surest(scores: Sequence[Scores | None], whole: Sequence[bool], score: str = SCORE) -> int:
    """Index of the surest answer; of those that are not whole only where none is. The first of equals.

    A text that loops is as sure as can be, and one that was cut off has not come to the hard part: so neither
    is compared with whole ones.

    Args:
        scores: of each answer; None: it has no token.
        score: a name of `RANKED`.
    """

    def rank(index: int) -> tuple[bool, float]:
        found = scores[index]
        return whole[index], -float("inf") if found is None else RANKED[score](found)

    return max(range(len(scores)), key=rank)
