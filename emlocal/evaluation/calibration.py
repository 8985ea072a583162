"""Calibrations fitted on judged answers: they map a score to the probability that the answer is right.

The chosen score and curve are those with the lowest log loss on questions that the curve was not fitted on.
The curves:

- Platt's: logistic, two parameters. Platt 1999, with the targets (n₊ + 1)/(n₊ + 2) and 1/(n₋ + 2) instead of
  1 and 0, fitted by Newton's method as in Lin, Lin and Weng 2007. A negative slope becomes 0.
- Isotonic: the rising steps with the least squared error, found by pooling adjacent violators (Ayer et al.
  1955). Each step's share counts half an answer more of either kind, so no step is 0 or 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from emlocal.em.scores import RANKED
from emlocal.errors import EmlocalError, UsageError
from emlocal.evaluation.confidence import Cases
from emlocal.evaluation.selective import auroc, brier, calibration_error
from emlocal.methods.confidence import FREE, METHOD, Curve, Isotonic, Platt

Array = NDArray[np.float64]
FOLDS = 5
LEAST = 5
"""Minimum number of right answers, and of wrong answers, for a fit."""
_PRIOR = 0.5
"""Number of right and of wrong answers that are added to those of each share."""
_MOST_STEPS, _HALVINGS = 100, 40
_FLAT = 700.0
"""Largest exponent; e^x overflows a float64 a little above it."""


@dataclass(frozen=True)
class Fitted:
    """A fitted calibration with its figures."""

    score: str
    """`METHOD` or a name of `RANKED`."""
    curve: Curve
    auroc: float | None
    """Measured in five folds, on questions that neither the score nor the curve was chosen on."""
    calibration_error: float
    brier: float
    """`calibration_error` and `brier` come from the same five folds."""


def check_target(path: Path | None, methods: int) -> None:
    """Raises UsageError if --calibrate cannot write its file, or if there are several methods."""
    if path is None:
        return
    if methods > 1:
        raise UsageError(
            f"--calibrate needs exactly one method; --methods names {methods}",
            "name one method; its existing answers are used again",
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"--calibrate {path} cannot be written", "name a file in a folder that exists")


def fit(cases: Cases, seed: int) -> Fitted:
    """Chooses a score and its curve.

    Raises EmlocalError if there are too few right or wrong answers.
    """
    right = sum(cases.right)
    wrong = len(cases.right) - right
    if min(right, wrong) < LEAST:
        raise EmlocalError(
            f"a calibration needs {LEAST} right and {LEAST} wrong answers; here are {right:,} and {wrong:,}",
            "ask more questions with a larger --limit",
        )
    p = [0.0] * len(cases.right)
    for inside, outside in folds(cases.problems, seed):
        train = cases.part(inside)
        score, curve = _choose(train, seed)
        for i in outside:
            p[i] = curve(cases.raw(score)[i])
    score, curve = _choose(cases, seed)
    return Fitted(
        score, curve, auroc(p, cases.right), calibration_error(p, cases.right), brier(p, cases.right)
    )


def folds(problems: Sequence[str], seed: int) -> list[tuple[list[int], list[int]]]:
    """Returns five pairs (places to fit on, places left out).

    All answers to a problem are in the same part.
    """
    names = list(dict.fromkeys(problems))
    order = Generator(Philox(key=seed)).permutation(len(names))
    fold = {names[i]: place % FOLDS for place, i in enumerate(order)}
    found = []
    for k in range(FOLDS):
        outside = [i for i, problem in enumerate(problems) if fold[problem] == k]
        inside = [i for i, problem in enumerate(problems) if fold[problem] != k]
        if inside and outside:
            found.append((inside, outside))
    return found


def _choose(cases: Cases, seed: int) -> tuple[str, Curve]:
    """Returns the score and curve with the lowest log loss on questions that the curve was not fitted on."""
    names = [METHOD] if cases.own else [FREE, *(name for name in RANKED if name != FREE)]
    parts = folds(cases.problems, seed)
    losses = {}
    for name in names:
        raw = cases.raw(name)
        for fitter in (platt, isotonic):
            missed: list[float] = []
            for inside, outside in parts:
                curve = fitter([raw[i] for i in inside], [cases.right[i] for i in inside])
                missed += [_log_loss(curve(raw[i]), cases.right[i]) for i in outside]
            losses[name, fitter] = fmean(missed)
    score, fitter = min(losses, key=losses.__getitem__)  # the first of equals
    return score, fitter(cases.raw(score), cases.right)


def _log_loss(p: float, right: bool) -> float:
    return -math.log(p if right else 1 - p)


# --------------------------------------------------------------------------------------------------- Platt


def platt(raw: Sequence[float], right: Sequence[bool]) -> Curve:
    """Fits the logistic curve. Raises ValueError if there are no answers."""
    n, hits = _counted(raw, right)
    low, high = _PRIOR / (n + 2 * _PRIOR), 1 - _PRIOR / (n + 2 * _PRIOR)
    mean = fmean(raw)
    spread = math.sqrt(fmean((x - mean) ** 2 for x in raw))
    level = _logit(_smoothed(hits, n))
    if spread == 0 or hits in (0, n):
        return Platt(0.0, level, low, high)
    z = (np.asarray(raw, dtype=np.float64) - mean) / spread
    targets = np.where(right, (hits + 1) / (hits + 2), 1 / (n - hits + 2))
    slope, intercept = _logistic(z, targets, level)
    if slope <= 0:
        return Platt(0.0, level, low, high)
    return Platt(slope / spread, intercept - slope * mean / spread, low, high)


def _logistic(z: Array, targets: Array, level: float) -> tuple[float, float]:
    """Returns the (slope, intercept) of least cross entropy, by Newton's method with halved steps.

    `z` has unit standard deviation.
    """
    design = np.stack([z, np.ones_like(z)])
    found = np.array([0.0, level])
    loss = _cross_entropy(found @ design, targets)
    for _ in range(_MOST_STEPS):
        p = 1 / (1 + np.exp(-np.clip(found @ design, -_FLAT, _FLAT)))
        gradient = design @ (p - targets)
        if np.abs(gradient).max() < 1e-9 * len(z):
            break
        step = np.linalg.solve((design * (p * (1 - p) + 1e-12)) @ design.T, gradient)
        for _ in range(_HALVINGS):
            new = _cross_entropy((found - step) @ design, targets)
            if new < loss:
                found, loss = found - step, new
                break
            step /= 2
        else:
            break
    return float(found[0]), float(found[1])


def _cross_entropy(y: Array, targets: Array) -> float:
    return float(np.sum(np.logaddexp(0, y) - targets * y))


# ------------------------------------------------------------------------------------------------- isotonic


@dataclass
class _Block:
    """Answers with neighbouring scores, which share one probability."""

    low: float
    high: float
    n: int
    right: int

    def joined(self, other: "_Block") -> "_Block":
        return _Block(self.low, other.high, self.n + other.n, self.right + other.right)


def isotonic(raw: Sequence[float], right: Sequence[bool]) -> Curve:
    """Fits the isotonic curve. Raises ValueError if there are no answers."""
    _counted(raw, right)
    blocks: list[_Block] = []
    for x, y in sorted(zip(raw, right, strict=True)):
        if blocks and blocks[-1].high == x:
            blocks[-1] = blocks[-1].joined(_Block(x, x, 1, y))
        else:
            blocks.append(_Block(x, x, 1, int(y)))
    steps: list[_Block] = []
    for block in blocks:
        steps.append(block)
        while len(steps) > 1 and steps[-2].right * steps[-1].n >= steps[-1].right * steps[-2].n:
            last = steps.pop()
            steps[-1] = steps[-1].joined(last)
    # Adding half an answer of either kind moves small steps most, perhaps past their neighbours.
    risen: list[_Block] = []
    for block in steps:
        risen.append(block)
        while len(risen) > 1 and _share(risen[-2]) >= _share(risen[-1]):
            last = risen.pop()
            risen[-1] = risen[-1].joined(last)
    knots = [(x, _share(block)) for block in risen for x in (block.low, block.high)]
    return Isotonic((knots[0], *(knot for before, knot in pairwise(knots) if knot[0] > before[0])))


def _share(block: _Block) -> float:
    return _smoothed(block.right, block.n)


def _smoothed(right: int, n: int) -> float:
    return (right + _PRIOR) / (n + 2 * _PRIOR)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _counted(raw: Sequence[float], right: Sequence[bool]) -> tuple[int, int]:
    """Returns the number of answers and the number of right ones."""
    if not raw or len(raw) != len(right):
        raise ValueError(f"{len(raw)} scores and {len(right)} verdicts cannot be evaluated")
    return len(raw), sum(right)
