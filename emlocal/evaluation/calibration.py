"""A calibration fitted on judged answers: from a score to the chance that the answer is right.

Two curves. Of fewer than `ISOTONIC_FROM` answers it is Platt's, since steps fitted to few follow their chance
(Niculescu-Mizil and Caruana 2005); of more, the one that does better on questions it was not fitted on (log
loss):

- Platt's: logistic, two numbers. Platt 1999, with the targets (n₊ + 1)/(n₊ + 2) and 1/(n₋ + 2) instead of 1
  and 0, fitted by Newton's method as in Lin, Lin and Weng 2007. A slope below 0 becomes 0.
- Isotonic: the rising steps nearest to the answers by least squares, from pooling adjacent violators (Ayer et
  al. 1955), each step's share with half an answer more of either kind: no step says 0 or 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from numpy.random import Generator, Philox

from emlocal.em.scores import RANKED
from emlocal.errors import EmlocalError
from emlocal.evaluation.confidence import Cases
from emlocal.evaluation.selective import auroc, brier, calibration_error
from emlocal.methods.confidence import FREE, METHOD, Curve, Isotonic, Platt

FOLDS = 5
LEAST = 5
"""Right answers, and wrong ones, without which there is nothing to fit."""
ISOTONIC_FROM = 200
_PRIOR = 0.5
"""Answers of either kind that each share has more than there are."""


@dataclass(frozen=True)
class Fitted:
    """What came of it."""

    score: str
    """`METHOD`, or of `RANKED` the one that tells right from wrong best."""
    curve: Curve
    auroc: float | None
    """On questions that neither score nor curve was chosen on: from five folds, each with its own choice …"""
    calibration_error: float
    brier: float
    """… and so are these two."""


def fit(cases: Cases, seed: int) -> Fitted:
    """Choose a score and its curve.

    Raises EmlocalError where there are too few right or wrong answers.
    """
    right = sum(cases.right)
    wrong = len(cases.right) - right
    if min(right, wrong) < LEAST:
        raise EmlocalError(
            f"a calibration needs {LEAST} right and {LEAST} wrong answers; here are {right:,} and {wrong:,}",
            "take more questions, with a larger --limit",
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
    """(places to fit on, places left out), five times; all answers to a problem are in one of the two."""
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
    names = [METHOD] if cases.own else [FREE, *(name for name in RANKED if name != FREE)]
    score = max(
        names, key=lambda name: auroc(cases.raw(name), cases.right) or 0.0
    )  # max: the first of equals
    raw = cases.raw(score)
    if len(raw) < ISOTONIC_FROM:
        return score, platt(raw, cases.right)
    losses = {}
    for fitter in (platt, isotonic):
        missed: list[float] = []
        for inside, outside in folds(cases.problems, seed):
            curve = fitter([raw[i] for i in inside], [cases.right[i] for i in inside])
            missed += [_log_loss(curve(raw[i]), cases.right[i]) for i in outside]
        losses[fitter] = fmean(missed)
    best = min(losses, key=losses.__getitem__)
    return score, best(raw, cases.right)


def _log_loss(p: float, right: bool) -> float:
    return -math.log(p if right else 1 - p)


# --------------------------------------------------------------------------------------------------- Platt


def platt(raw: Sequence[float], right: Sequence[bool]) -> Curve:
    """The logistic curve. Raises ValueError for no answers."""
    n, hits = _counted(raw, right)
    low, high = _PRIOR / (n + 2 * _PRIOR), 1 - _PRIOR / (n + 2 * _PRIOR)
    mean = fmean(raw)
    spread = math.sqrt(fmean((x - mean) ** 2 for x in raw))
    level = _logit(_smoothed(hits, n))
    if spread == 0 or hits in (0, n):
        return Platt(0.0, level, low, high)
    z = [(x - mean) / spread for x in raw]
    targets = [(hits + 1) / (hits + 2) if y else 1 / (n - hits + 2) for y in right]
    slope, intercept = _logistic(z, targets, level)
    if slope <= 0:
        return Platt(0.0, level, low, high)
    return Platt(slope / spread, intercept - slope * mean / spread, low, high)


def _logistic(z: Sequence[float], targets: Sequence[float], level: float) -> tuple[float, float]:
    """(slope, intercept) of least cross entropy, by Newton's method with halved steps; z has unit spread."""
    a, b = 0.0, level
    loss = _cross_entropy(z, targets, a, b)
    for _ in range(100):
        p = [_sigmoid(a * x + b) for x in z]
        ga = math.fsum((q - t) * x for q, t, x in zip(p, targets, z, strict=True))
        gb = math.fsum(q - t for q, t in zip(p, targets, strict=True))
        if max(abs(ga), abs(gb)) < 1e-9 * len(z):
            break
        w = [q * (1 - q) + 1e-12 for q in p]
        haa = math.fsum(v * x * x for v, x in zip(w, z, strict=True))
        hab = math.fsum(v * x for v, x in zip(w, z, strict=True))
        hbb = math.fsum(w)
        det = haa * hbb - hab * hab
        da, db = (hbb * ga - hab * gb) / det, (haa * gb - hab * ga) / det
        step = 1.0
        while step > 1e-10:
            new = _cross_entropy(z, targets, a - step * da, b - step * db)
            if new < loss:
                a, b, loss = a - step * da, b - step * db, new
                break
            step /= 2
        else:
            break
    return a, b


def _cross_entropy(z: Sequence[float], targets: Sequence[float], a: float, b: float) -> float:
    total = 0.0
    for x, t in zip(z, targets, strict=True):
        y = a * x + b
        total += max(y, 0.0) - t * y + math.log1p(math.exp(-abs(y)))
    return total


def _sigmoid(y: float) -> float:
    return 1 / (1 + math.exp(-y)) if y >= 0 else math.exp(y) / (1 + math.exp(y))


# ------------------------------------------------------------------------------------------------- isotonic


@dataclass
class _Block:
    """Answers of neighbouring scores that get one share."""

    low: float
    high: float
    n: int
    right: int

    def joined(self, other: "_Block") -> "_Block":
        return _Block(self.low, other.high, self.n + other.n, self.right + other.right)


def isotonic(raw: Sequence[float], right: Sequence[bool]) -> Curve:
    """The rising curve. Raises ValueError for no answers."""
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
    # half an answer more of either kind moves small steps furthest, past their neighbours maybe
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
    """How many answers, and how many of them are right."""
    if not raw or len(raw) != len(right):
        raise ValueError(f"{len(raw)} scores and {len(right)} verdicts tell nothing")
    return len(raw), sum(right)
