"""Confidence: one number from 0 to 1 for an answer, and its meaning.

There are three kinds:

- A method that knows more than one text gives its own, for example the winner's share of a vote.
- Otherwise it is exp(mean log-probability), the geometric mean of the probabilities of the answer's tokens.
  It is between 0 and 1 and rises with the model's certainty, but it is not the probability of being right.
- With a calibration, written by `emlocal eval --calibrate`, it is that probability: of the answers with 0.8,
  eight in ten were right on the questions that the file was made from.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from emlocal.em.scores import RANKED
from emlocal.errors import EmlocalError, UsageError
from emlocal.files import atomic_writer
from emlocal.methods import Chosen, Outcome, name_of
from emlocal.methods.scoring import scores_of
from emlocal.settings import Plan, describe_em
from emlocal.text import harmless, parse_json

FORMAT = "emlocal-calibration-1"
METHOD = "method"
"""Source of a confidence that the method itself computes."""
FREE = "mean-log-probability"
"""The score behind all other confidences, before any calibration."""
_LARGEST = 1 << 20
"""Maximum size of a calibration file in bytes; one from a thousand answers has a tenth of it."""


@dataclass(frozen=True)
class Confidence:
    """The confidence of an answer."""

    value: float
    """From 0 to 1."""
    source: str
    """`METHOD`, or the score behind it, from `emlocal.em.scores.RANKED`."""
    calibrated: bool
    """Whether `value` is a share of right answers, from a calibration for this model and method."""

    def as_json(self) -> dict[str, Any]:
        """Returns the fields of an output row."""
        return {
            "confidence": round(self.value, 6),
            "confidence_from": self.source,
            "calibrated": self.calibrated,
        }


@dataclass(frozen=True)
class Subject:
    """The model, method and settings behind a confidence; a calibration is valid for one subject."""

    model: str
    method: str
    samples: int
    drawn: str
    """Temperature, EM, and the use of several samples, in words."""

    def differences(self, other: "Subject") -> str:
        """Describes the differences: "method vote, not greedy; samples 8, not 1"; empty if there are none."""
        ours, theirs = asdict(self), asdict(other)
        return "; ".join(
            f"{name} {ours[name]}, not {theirs[name]}" for name in ours if ours[name] != theirs[name]
        )


def subject_of(model: str, method: Chosen, plan: Plan) -> Subject:
    """Returns the subject of answers by this method with these settings."""
    params = plan.params
    drawn = [f"T {params.temperature:g}", f"EM {describe_em(params.em)}"]
    words = ", ".join([*drawn, *method.collecting.describe(plan.samples)])
    return Subject(model, method.name or name_of(params), plan.samples, words)


# -------------------------------------------------------------------------------------------- calibrations


@dataclass(frozen=True)
class Platt:
    """A logistic curve: p = 1 / (1 + exp(−(slope · raw + intercept))), limited to `low` and `high`."""

    slope: float
    intercept: float
    low: float
    high: float

    def __call__(self, raw: float) -> float:
        """Returns the probability of being right."""
        z = self.slope * raw + self.intercept
        p = 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
        return min(max(p, self.low), self.high)


@dataclass(frozen=True)
class Isotonic:
    """Rising lines between knots (raw, p), constant before the first knot and after the last."""

    knots: tuple[tuple[float, float], ...]

    def __call__(self, raw: float) -> float:
        """Returns the probability of being right."""
        xs = [x for x, _ in self.knots]
        i = bisect_right(xs, raw)
        if i == 0 or i == len(xs):
            return self.knots[min(i, len(xs) - 1)][1]
        (x0, p0), (x1, p1) = self.knots[i - 1 : i + 1]
        return p0 + (p1 - p0) * (raw - x0) / (x1 - x0)


Curve = Platt | Isotonic


@dataclass(frozen=True)
class Calibration:
    """Maps a raw confidence or a score to the probability that the answer is right."""

    subject: Subject
    score: str
    """The curve's input: `METHOD`, or a name of `RANKED`."""
    curve: Curve
    fitted_on: Mapping[str, Any] = field(default_factory=dict)
    """Task, data, number of answers and of right ones, adapters, date."""
    cross_fitted: Mapping[str, float] = field(default_factory=dict)
    """AUROC, expected calibration error and Brier score over five folds, on questions outside the fit."""
    path: str = ""
    """The file that it was read from."""

    def __call__(self, outcome: Outcome, subject: Subject) -> Confidence | None:
        """Returns the confidence of an outcome; None if the outcome lacks the curve's input."""
        if self.score == METHOD:
            raw = _own(outcome)
        else:
            found = scores_of(outcome.completion)
            raw = None if found is None else RANKED[self.score](found)
        if raw is None:
            return None
        return Confidence(self.curve(raw), self.score, subject == self.subject)

    def mismatch(self, subject: Subject) -> str | None:
        """Returns a warning if the calibration was made for other answers than these, else None."""
        differing = self.subject.differences(subject)
        return (
            f"{self.path} was fitted on other answers ({differing}); rows say calibrated false"
            if differing
            else None
        )

    @property
    def digest(self) -> str:
        """Hash of the calibration's content, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Any]:
        """Returns the object in the calibration's file."""
        kind = "isotonic" if isinstance(self.curve, Isotonic) else "platt"
        return {
            "format": FORMAT,
            **asdict(self.subject),
            "score": self.score,
            "curve": {"kind": kind, **asdict(self.curve)},
            "fitted_on": dict(self.fitted_on),
            "cross_fitted": dict(self.cross_fitted),
        }

    def write(self, path: Path) -> None:
        """Writes the file. Raises EmlocalError if it cannot be written."""
        with atomic_writer(path) as file:
            json.dump(self.as_json(), file, ensure_ascii=False, indent=1)
            file.write("\n")


def confidence_of(
    outcome: Outcome, subject: Subject, calibration: Calibration | None = None
) -> Confidence | None:
    """Returns an outcome's confidence, calibrated if possible, else raw.

    Returns None for an answer without tokens.
    """
    found = None if calibration is None else calibration(outcome, subject)
    return found or raw_confidence(outcome)


def raw_confidence(outcome: Outcome) -> Confidence | None:
    """Returns the confidence before any calibration."""
    own = _own(outcome)
    if own is not None:
        return Confidence(own, METHOD, False)
    found = scores_of(outcome.completion)
    return None if found is None else Confidence(math.exp(found.mean_log_probability), FREE, False)


def _own(outcome: Outcome) -> float | None:
    return 0.0 if outcome.undecided else outcome.confidence


# -------------------------------------------------------------------------------------------------- reading


def read_calibration(path: Path) -> Calibration:
    """Reads a calibration from a file.

    Raises UsageError for a file that is missing, damaged, of another version, or not written by `eval
    --calibrate`. Raises EmlocalError if it cannot be read.
    """
    try:
        with path.expanduser().open("rb") as file:
            raw = file.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST:,} bytes")
        found = parse_json(raw)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}", "write one with emlocal eval --calibrate FILE") from None
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why
    except (ValueError, RecursionError) as why:
        raise UsageError(f"{path} is not a calibration: {why}") from None
    name = found.get("format") if isinstance(found, dict) else None
    if name != FORMAT:
        raise UsageError(
            f"{path} is not a calibration of this version of emlocal: its format is {name!r}, not {FORMAT!r}",
            "write one with emlocal eval --calibrate FILE",
        )
    try:
        return Calibration(
            Subject(
                harmless(_text(found, "model")),
                harmless(_text(found, "method")),
                int(_number(found["samples"])),
                harmless(_text(found, "drawn")),
            ),
            _score(found),
            _curve(found["curve"]),
            dict(found["fitted_on"]),
            dict(found["cross_fitted"]),
            str(path),
        )
    except (KeyError, TypeError, ValueError) as why:
        raise UsageError(f"{path} is damaged: {why}", "run the same emlocal eval --calibrate again") from None


def _score(found: Mapping[str, Any]) -> str:
    score = _text(found, "score")
    if score != METHOD and score not in RANKED:
        raise ValueError(f"there is no score {score!r}")
    return score


def _curve(found: Mapping[str, Any]) -> Curve:
    if found["kind"] == "platt":
        slope, intercept, low, high = (_number(found[name]) for name in ("slope", "intercept", "low", "high"))
        if slope < 0 or not 0 <= low <= high <= 1:
            raise ValueError("its curve does not rise from 0 to 1")
        return Platt(slope, intercept, low, high)
    if found["kind"] != "isotonic":
        raise ValueError(f"there is no curve {found['kind']!r}")
    knots = tuple((_number(x), _number(p)) for x, p in found["knots"])
    if not knots or not _rises(knots):
        raise ValueError("its knots do not rise from 0 to 1")
    return Isotonic(knots)


def _rises(knots: Sequence[tuple[float, float]]) -> bool:
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(knots))
    return rising and 0 <= knots[0][1] <= knots[-1][1] <= 1


def _text(of: Mapping[str, Any], name: str) -> str:
    if not isinstance(of[name], str):
        raise TypeError(f"{name} is not a text")
    return str(of[name])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a number")
    return float(value)
