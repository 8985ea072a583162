"""Figures from judged answers: accuracies with intervals, costs, and paired differences.

The unit is the *whole* problem, because several answers to one question, or the steps of one problem, are not
independent. So intervals resample whole problems, and a paired difference is one number for each problem.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from emlocal.evaluation.answering import Judged
from emlocal.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    holm,
    pass_at_k,
    sign_flip,
    wilson,
)
from emlocal.evaluation.tasks.task import Task

BINS = 40
"""Maximum number of points on the curve of entropy along the answer."""
_ENOUGH = 0.25  # the curve ends where less than this share of the answers is as long


@dataclass(frozen=True)
class Estimate:
    """A share or a mean with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """Mean cost of one answer by the method. Everything that was sampled for it counts."""

    read: float
    """Prompt tokens, as if each question were asked alone: a shared prefix counts for each prompt."""
    written: float
    """Generated tokens."""
    passes: float
    """Forward passes that the answer took part in."""
    seconds: float
    """Duration of the run divided by its answers. It depends on how many sequences run at once."""
    flops: float
    """2 P D: two operations for each parameter and each token read or written."""


@dataclass(frozen=True)
class Curve:
    """Mean entropy along the answers, in nats."""

    position: tuple[float, ...]
    """Tokens from the start of the answer."""
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class MethodResult:
    """Results of one contender."""

    name: str
    settings: str
    repetitions: int
    accuracy: Estimate
    """mean@K."""
    pass_at: Mapping[int, Estimate]
    """pass@k by k; empty with one answer to each question."""
    solved: Estimate | None
    """Share of whole problems with all steps right; None if problems have no steps."""
    no_answer: int
    """Number of texts in which no answer was found."""
    guessed: int
    """Number of answers without the requested form: the last number of a text without a box."""
    cut_off: int
    """Number of answers that reached a limit. A vote counts by the share of its samples that did."""
    errors: int
    """Number of questions that could not be asked because the prompt does not fit the context."""
    cost: Cost
    entropy_before: float
    """Mean over tokens, in nats."""
    entropy_after: float
    curve: Curve | None
    right: Mapping[str, float]
    """By whole problem: its number of right answers, averaged over the repetitions."""


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of one contender with the reference, problem by problem."""

    name: str
    reference: str
    difference: Estimate
    """Difference of mean@K; positive if `name` is better."""
    wins: int
    """Whole problems on which `name` is better; `losses` counts those on which it is worse."""
    losses: int
    p: float
    """p-value of McNemar's exact test for single answers, otherwise of random sign flips."""
    p_holm: float
    """The p-value adjusted by Holm for all comparisons of the evaluation."""


def summarize(
    task: Task, name: str, settings: str, judged: Sequence[Judged], parameters: int, seed: int
) -> MethodResult:
    """Computes the figures of one contender.

    `parameters`: those that each token is multiplied with, for the FLOPs.
    """
    repetitions = max(one.answer.repetition for one in judged)
    rows = [one.answer.row for one in judged]
    before, after = _entropy(rows)
    right = _right_by_whole(task, judged, repetitions)
    return MethodResult(
        name,
        settings,
        repetitions,
        _accuracy(task, judged, right, repetitions, seed),
        _pass_at(judged, repetitions, seed),
        _solved(task, right) if any(size > 1 for size in _sizes(task).values()) else None,
        sum(one.verdict.mark == "no answer" and one.answer.error is None for one in judged),
        sum(one.verdict.detail == "last-number" for one in judged),
        round(sum(map(share_cut_off, rows))),
        sum(one.answer.error is not None for one in judged),
        _cost(rows, parameters),
        before,
        after,
        _curve(rows),
        right,
    )


def compare(task: Task, results: Sequence[MethodResult], seed: int) -> list[Comparison]:
    """Compares each contender with the first."""
    reference, *others = results
    right = {result.name: result.right for result in results}
    return compare_pairs(right, [(other.name, reference.name) for other in others], _sizes(task), seed)


def compare_pairs(
    right: Mapping[str, Mapping[str, float]],
    pairs: Sequence[tuple[str, str]],
    sizes: Mapping[str, int],
    seed: int,
) -> list[Comparison]:
    """Compares the first of each pair with the second; adjusts for multiple comparisons.

    `right`: `MethodResult.right` by contender. `sizes`: number of problems in each whole problem.
    """
    found = []
    for name, reference in pairs:
        differences = [right[name][whole] - right[reference][whole] for whole in sizes]
        interval = bootstrap_mean(differences, seed, sizes=list(sizes.values()))
        difference = _estimate(sum(differences) / sum(sizes.values()), interval)
        wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        found.append((name, reference, difference, wins, losses, sign_flip(differences, seed)))
    adjusted = holm([p for *_, p in found])
    return [Comparison(*one, p_holm) for one, p_holm in zip(found, adjusted, strict=True)]


def _sizes(task: Task) -> dict[str, int]:
    """Returns the number of problems in each whole problem."""
    sizes: dict[str, int] = {}
    for problem in task.problems:
        whole = task.whole(problem)
        sizes[whole] = sizes.get(whole, 0) + 1
    return sizes


def _right_by_whole(task: Task, judged: Sequence[Judged], repetitions: int) -> dict[str, float]:
    right: dict[str, int] = dict.fromkeys(_sizes(task), 0)
    for one in judged:
        right[task.whole(one.answer.problem)] += one.verdict.right
    return {whole: n / repetitions for whole, n in right.items()}


def _accuracy(
    task: Task, judged: Sequence[Judged], right: Mapping[str, float], repetitions: int, seed: int
) -> Estimate:
    sizes = _sizes(task)
    value = sum(right.values()) / len(task.problems)
    if repetitions == 1 and max(sizes.values()) == 1:
        return _estimate(value, wilson(round(sum(right.values())), len(judged)))
    return _estimate(value, _interval(value, list(right.values()), list(sizes.values()), seed))


def _interval(mean: float, values: Sequence[float], sizes: Sequence[int], seed: int) -> Interval:
    """Returns the interval of a mean over whole problems.

    If all are right, or none, resampling gives no width; Wilson's interval then treats each as one answer.
    """
    if mean in (0.0, 1.0):
        return wilson(round(mean * len(values)), len(values))
    return bootstrap_mean(values, seed, sizes=sizes)


def _pass_at(judged: Sequence[Judged], repetitions: int, seed: int) -> dict[int, Estimate]:
    """Returns pass@k for k = 1, 2, 4, … and K. If problems have steps, each step counts by itself."""
    if repetitions == 1:
        return {}
    right: dict[str, int] = {}
    for one in judged:
        id_ = one.answer.problem.id
        right[id_] = right.get(id_, 0) + one.verdict.right
    ks = sorted({2**i for i in range(repetitions.bit_length())} | {repetitions})
    found = {}
    for k in (k for k in ks if k <= repetitions):
        values = [pass_at_k(repetitions, n, k) for n in right.values()]
        mean = fmean(values)
        found[k] = _estimate(mean, _interval(mean, values, [1] * len(values), seed))
    return found


def _solved(task: Task, right: Mapping[str, float]) -> Estimate:
    """Returns the share of solved problems.

    With several repetitions, a problem is solved if all its answers are right.
    """
    sizes = _sizes(task)
    solved = sum(right[whole] >= size for whole, size in sizes.items())
    return _estimate(solved / len(sizes), wilson(solved, len(sizes)))


def share_cut_off(row: Mapping[str, Any]) -> float:
    """Returns the share of an answer's samples that reached a limit."""
    drawn = row.get("samples") or [row]
    return fmean(one.get("finish_reason") in ("length", "context") for one in drawn)


def _cost(rows: Sequence[Mapping[str, Any]], parameters: int) -> Cost:
    answered = [row for row in rows if "text" in row]
    if not answered:
        return Cost(0.0, 0.0, 0.0, 0.0, 0.0)
    read = fmean(row["prompt_tokens"] for row in answered)
    written = fmean(row["completion_tokens"] for row in answered)
    return Cost(
        read,
        written,
        fmean(row["forward_passes"] for row in answered),
        sum(row["elapsed"] for row in rows) / len(answered),
        2.0 * parameters * (read + written),
    )


def _entropy(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Returns the mean entropy over all tokens of the chosen answers, before and after EM."""
    before = [h for row in rows if "entropies" in row for h in row["entropies"]["before"]]
    after = [h for row in rows if "entropies" in row for h in row["entropies"]["after"]]
    return (fmean(before), fmean(after)) if before else (0.0, 0.0)


def _curve(rows: Sequence[Mapping[str, Any]]) -> Curve | None:
    """Returns the mean over the answers that reach each position, in bins of tokens.

    Returns None without entropies.
    """
    traces = [row["entropies"] for row in rows if "entropies" in row and row["entropies"]["before"]]
    if not traces:
        return None
    lengths = sorted((len(trace["before"]) for trace in traces), reverse=True)
    end = max(1, lengths[min(len(lengths) - 1, int(_ENOUGH * len(lengths)))])
    width = max(1, -(-end // BINS))
    points = []
    for start in range(0, end, width):
        bins = {
            side: [h for trace in traces for h in trace[side][start : min(start + width, end)]]
            for side in ("before", "after")
        }
        points.append((start + (width - 1) / 2, fmean(bins["before"]), fmean(bins["after"])))
    position, before, after = zip(*points, strict=True)
    return Curve(position, before, after)


def _estimate(value: float, interval: Interval) -> Estimate:
    return Estimate(value, interval.low, interval.high)
