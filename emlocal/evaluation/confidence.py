"""Figures that say how well each score of an evaluation's answers predicts whether they are right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emlocal.em.scores import RANKED, Scores
from emlocal.evaluation.answering import Judged
from emlocal.evaluation.results import Estimate
from emlocal.evaluation.selective import calibration_error, select
from emlocal.methods.confidence import METHOD, Calibration

CONFIDENCE = "confidence"
"""Name, among the scores, of the confidence that rows contain."""
CALIBRATED = "calibrated"
"""Name, among the scores, of the confidence after calibration."""


@dataclass(frozen=True)
class ScoreResult:
    """How well one score of one contender's answers predicts whether they are right."""

    score: str
    """`CONFIDENCE`, `CALIBRATED`, or a name of `emlocal.em.scores.RANKED`."""
    answers: int
    auroc: Estimate | None
    """Probability that a right answer scores higher than a wrong one; None if all are right, or none is."""
    calibration_error: float | None
    """Expected calibration error over ten bins; None for scores that are not shares."""
    risks: tuple[Estimate, ...]
    """Share of wrong answers among the most confident, for each of `selective.COVERAGES`."""


@dataclass(frozen=True)
class Cases:
    """Parallel lists of answers' scores and whether the answers are right."""

    scores: Mapping[str, Sequence[float]]
    """By name of `RANKED`."""
    confidence: Sequence[float]
    own: bool
    """Whether the confidence is the method's own."""
    right: Sequence[bool]
    problems: Sequence[str]
    """Ids of the whole problems."""

    @classmethod
    def of(cls, judged: Sequence[Judged], wholes: Sequence[str]) -> "Cases":
        """Returns the cases of those answers whose rows have scores; earlier versions wrote none.

        If some answers have a confidence of the method's own, only these count.
        """
        pairs = [
            (one, whole)
            for one, whole in zip(judged, wholes, strict=True)
            if one.answer.row.get("scores") is not None and "confidence" in one.answer.row
        ]
        own = any(one.answer.row["confidence_from"] == METHOD for one, _ in pairs)
        kept = [
            (one, whole) for one, whole in pairs if not own or one.answer.row["confidence_from"] == METHOD
        ]
        rows = [one.answer.row for one, _ in kept]
        found = [Scores(**row["scores"]) for row in rows]
        return cls(
            {name: [rank(scores) for scores in found] for name, rank in RANKED.items()},
            [float(row["confidence"]) for row in rows],
            own,
            [one.verdict.right for one, _ in kept],
            [whole for _, whole in kept],
        )

    def raw(self, score: str) -> Sequence[float]:
        """Returns the values that a calibration of this score starts from."""
        return self.confidence if score == METHOD else self.scores[score]

    def part(self, which: Sequence[int]) -> "Cases":
        """Returns the cases at these places."""
        return Cases(
            {name: [values[i] for i in which] for name, values in self.scores.items()},
            [self.confidence[i] for i in which],
            self.own,
            [self.right[i] for i in which],
            [self.problems[i] for i in which],
        )


def score_results(cases: Cases, seed: int, calibration: Calibration | None = None) -> list[ScoreResult]:
    """Returns the figures of the confidence, of the calibrated confidence (if any) and of all scores.

    Without answers, the list is empty.
    """
    if not cases.right:
        return []
    shares: dict[str, Sequence[float]] = {CONFIDENCE: cases.confidence}
    if calibration is not None and (calibration.score != METHOD or cases.own):
        shares[CALIBRATED] = [calibration.curve(raw) for raw in cases.raw(calibration.score)]
    found = []
    for name, values in {**shares, **cases.scores}.items():
        selection = select(values, cases.right, cases.problems, seed)
        auroc, interval = selection.auroc, selection.auroc_interval
        found.append(
            ScoreResult(
                name,
                len(cases.right),
                None if auroc is None or interval is None else Estimate(auroc, interval.low, interval.high),
                calibration_error(values, cases.right) if name in shares else None,
                tuple(
                    Estimate(risk, each.low, each.high)
                    for risk, each in zip(selection.risks, selection.risk_intervals, strict=True)
                ),
            )
        )
    return found


def as_json(result: ScoreResult) -> dict[str, Any]:
    """Returns the object for results.json."""
    return {
        "score": result.score,
        "answers": result.answers,
        "auroc": None if result.auroc is None else vars(result.auroc),
        "calibration_error": result.calibration_error,
        "risks": [vars(risk) for risk in result.risks],
    }
