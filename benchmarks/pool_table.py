"""Computes votes, best-of-N and confidences from a pool of answers (benchmarks/pool.py), without a model.

Prints Markdown: each way of choosing one of a question's answers, compared with the greedy answer (McNemar,
not adjusted); what each score tells within a question and between questions; and the vote's risk against
coverage.

    python benchmarks/pool_table.py NAME.jsonl --task gsm8k --data gsm8k/train.jsonl
"""

import argparse
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from emlocal.em.scores import RANKED, Scores
from emlocal.evaluation.answering import Answer, Judge
from emlocal.evaluation.report.texts import markdown_table, p_value
from emlocal.evaluation.selective import COVERAGES, select
from emlocal.evaluation.statistics import bootstrap_mean, mcnemar, wilson
from emlocal.evaluation.tasks import open_task
from emlocal.methods.vote import Vote
from emlocal.methods.voting import Ballot, Rules, replay


@dataclass(frozen=True)
class Sampled:
    """One answer of the pool."""

    right: bool
    tokens: int
    scores: Scores
    whole: bool
    ballot: Ballot


Question = Sequence[Sampled]
"""Answers to one question, the greedy one first."""


def read(path: Path, task_name: str, data: Path) -> list[Question]:
    """Reads and judges the pool's answers; the verdicts are stored beside it."""
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    rows = [json.loads(line) for line in raw.splitlines()]
    task = open_task(task_name, data)
    problems = {problem.id: problem for problem in task.problems}
    found = []
    with Judge(task, path.with_suffix(".verdicts.jsonl")) as judge:
        for row in rows:
            samples = row["samples"]
            answers = [Answer(problems[row["id"]], 1, {"text": s["text"]}, {}) for s in samples]
            verdicts = [judged.verdict.right for judged in judge.judge(answers)]
            found.append([sampled(*one) for one in zip(range(len(samples)), samples, verdicts, strict=True)])
    return found


def sampled(number: int, row: dict[str, object], right: bool) -> Sampled:
    """Returns a stored sample with its ballot."""
    scores = Scores(**row["scores"])  # type: ignore[arg-type]
    text, reason, repeated = str(row["text"]), str(row["finish_reason"]), float(row["repeated"])  # type: ignore[arg-type]
    ballot = Vote().ballot_of(number, text, reason, repeated, scores)
    assert ballot is not None  # nothing in a pool was cancelled
    return Sampled(right, int(row["tokens"]), scores, ballot.whole, ballot)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Way:
    """A way of choosing: whether each question's chosen answer is right, and the tokens that it cost."""

    name: str
    right: list[bool]
    tokens: list[int]


def greedy(pool: Sequence[Question]) -> Way:
    return Way("greedy", [q[0].right for q in pool], [q[0].tokens for q in pool])


def vote(pool: Sequence[Question], name: str, rules: Rules, n: int = 8) -> Way:
    """Returns the vote of the first n samples, stopped as the rules say."""
    way = Way(name, [], [])
    for q in pool:
        decision = replay([s.ballot for s in q[:n]], rules).decision
        way.right.append(q[0 if decision.winner is None else decision.winner.sample].right)
        way.tokens.append(sum(s.tokens for s in q[: decision.drawn]))
    return way


def best(pool: Sequence[Question], score: str) -> Way:
    """Returns the most certain of the samples without the greedy answer.

    Whole ones, if there are any, come first.
    """
    rank = RANKED[score]
    chosen = [max([s for s in q[1:] if s.whole] or q[1:], key=lambda s: rank(s.scores)) for q in pool]
    cost = [sum(s.tokens for s in q[1:]) for q in pool]
    return Way(f"surest of {len(pool[0]) - 1} by {score}", [s.right for s in chosen], cost)


def ways(pool: Sequence[Question], scores: Sequence[str]) -> Iterator[Way]:
    """Yields all ways, greedy first."""
    yield greedy(pool)
    n = len(pool[0])
    for k in (k for k in (4, 8, 16) if k <= n):
        yield vote(pool, f"plain vote of {k}", Rules(sure=1.0, wave=k), k)
    yield vote(pool, f"plain vote of {n}, stopping", Rules(), n)
    for score, beta in product(scores, (0.5, 1.0, 2.0)):
        yield vote(pool, f"vote of {n}, {score}, β {beta:g}", Rules(score, beta, sure=1.0, wave=n), n)  # type: ignore[arg-type]
        yield vote(pool, f"the same, stopping", Rules(score, beta), n)  # type: ignore[arg-type]  # noqa: F541
    for alpha in (1.05, 1.25, 2.0):
        yield vote(
            pool, f"vote of {n}, p^{alpha - 1:g}", Rules("log-probability", alpha=alpha, sure=1.0, wave=n), n
        )
    for score in scores:
        yield best(pool, score)


def percent(values: Sequence[float]) -> str:
    """Formats a mean with its interval, in percent."""
    ends = bootstrap_mean(list(values)) if len(set(values)) > 1 else wilson(round(sum(values)), len(values))
    return f"{100 * fmean(values):.1f} [{100 * ends.low:.1f}, {100 * ends.high:.1f}]"


def table_of_ways(pool: Sequence[Question], scores: Sequence[str]) -> list[str]:
    """Returns a table of each way's accuracy, difference to greedy, and tokens."""
    base, *others = list(ways(pool, scores))
    single = fmean(fmean(s.right for s in q[1:]) for q in pool)
    cells = [[base.name, percent(base.right), "", "", "", f"{fmean(base.tokens):,.0f}"]]
    cells.append(["one sample, mean", f"{100 * single:.1f}", "", "", "", ""])
    for way in others:
        won = sum(a and not b for a, b in zip(way.right, base.right, strict=True))
        lost = sum(b and not a for a, b in zip(way.right, base.right, strict=True))
        gain = f"{100 * (fmean(way.right) - fmean(base.right)):+.1f}".replace("-", "−")
        cells.append(
            [
                way.name,
                percent(way.right),
                gain,
                f"{won}/{lost}",
                p_value(mcnemar(won, lost)),
                f"{fmean(way.tokens):,.0f}",
            ]
        )
    heads = ["way", "right, % [95 %]", "to greedy", "won/lost", "p", "tokens"]
    return markdown_table(heads, cells)


def within(pool: Sequence[Question], rank: Callable[[Scores], float]) -> float:
    """Returns the probability that a right sample scores above a wrong one of the same question.

    Ties count half.
    """
    wins = [
        (rank(a.scores) > rank(b.scores)) + 0.5 * (rank(a.scores) == rank(b.scores))
        for q in pool
        for a, b in product(q[1:], q[1:])
        if a.right and not b.right
    ]
    return fmean(wins) if wins else float("nan")


def table_of_scores(pool: Sequence[Question], scores: Sequence[str]) -> list[str]:
    """Returns a table of what each score tells: within a question, of the greedy answer, of all answers."""
    cells = []
    for score in scores:
        rank = RANKED[score]
        one = select([rank(q[0].scores) for q in pool], [q[0].right for q in pool], list(range(len(pool))))
        all_ = [(rank(s.scores), s.right, i) for i, q in enumerate(pool) for s in q]
        every = select(*map(list, zip(*all_, strict=True)))  # type: ignore[arg-type]
        cells.append([score, f"{within(pool, rank):.2f}", auroc(one), auroc(every)])
    return markdown_table(["score", "within a question", "AUROC, greedy", "AUROC, all samples"], cells)


def auroc(found: object) -> str:
    value, ends = found.auroc, found.auroc_interval  # type: ignore[attr-defined]
    return "–" if value is None or ends is None else f"{value:.2f} [{ends.low:.2f}, {ends.high:.2f}]"


def risk_of_votes(pool: Sequence[Question], rules: Rules) -> list[str]:
    """Returns the vote's risk against coverage, by its confidence."""
    decisions = [replay([s.ballot for s in q], rules).decision for q in pool]
    right = [
        q[0 if d.winner is None else d.winner.sample].right for q, d in zip(pool, decisions, strict=True)
    ]
    found = select([d.confidence for d in decisions], right, list(range(len(pool))))
    cells = [
        [f"{share:.0%}", f"{100 * (1 - risk):.1f} [{100 * (1 - ends.high):.1f}, {100 * (1 - ends.low):.1f}]"]
        for share, risk, ends in zip(COVERAGES, found.risks, found.risk_intervals, strict=True)
    ]
    return [
        f"AUROC of its confidence: {auroc(found)}",
        "",
        *markdown_table(["the surest", "right, % [95 %]"], cells),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scores", default=",".join(RANKED), help="names, with commas")
    given = parser.parse_args()
    scores = given.scores.split(",")
    pool = read(given.pool, given.task, given.data)
    print(f"{len(pool)} questions, {len(pool[0])} answers each\n")
    print("\n".join(table_of_ways(pool, scores)), end="\n\n")
    print("\n".join(table_of_scores(pool, scores)), end="\n\n")
    n = len(pool[0])
    print("\n".join(risk_of_votes(pool, Rules(sure=1.0, wave=n))))


if __name__ == "__main__":
    main()
