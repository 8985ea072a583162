"""Who wins a vote, and when it is over: pure functions of what the samples say, without any engine.

A method asks them while it draws (`vote.Vote`), and so does whoever has stored answers: the same votes can be
decided by another score, with other weights, in other waves or for fewer samples, and nothing is asked again.

    ballots = [Ballot(0, canonical("18"), "18", scores), Ballot(1), Ballot(2, canonical("3"), "3", others)]
    decide(ballots, Rules(score="mean-entropy", beta=0.5)).winner
    replay(ballots, Rules(sure=1.0)).stopped

Sources: the vote is self-consistency (arXiv 2203.11171), saturated ranks as weights are arXiv 2608.14420's,
the Beta rule of stopping is Adaptive-Consistency's (arXiv 2305.11860).
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from emlocal.em.scores import RANKED, Scores

Score = Literal[
    "none",
    "mean-entropy",
    "tail-entropy",
    "window-entropy",
    "largest-entropy",
    "answer-entropy",
    "unsure",
    "log-probability",
    "mean-log-probability",
]
"""A name of `RANKED`, or none."""
Stopped = Literal["decided", "sure", "budget", "cancelled"]
"""The leader cannot be caught any more; it is ahead with the wanted probability; all samples are drawn;
Ctrl-C."""
SATURATED = 0.75
"""From this rank on (share of the samples that are less sure) a sample weighs no more."""
GRAM = 4
"""Tokens that make a repetition."""
LOOPS = 0.5
"""A text of which a larger share repeats itself does."""


@dataclass(frozen=True)
class Ballot:
    """What one sample has to say."""

    sample: int
    """Its number; 0 is the greedy one."""
    key: Hashable | None = None
    """The same for answers that mean the same; None: it has no vote."""
    answer: str = ""
    """As it was written."""
    scores: Scores | None = None
    """Needed by all rules that look at a score."""
    whole: bool = True
    """Its text was not cut off, and does not loop."""


@dataclass(frozen=True)
class Rules:
    """How a vote is counted, and when it stops. Raises ValueError for what has no meaning."""

    score: Score = "none"
    """What says how sure a sample is: it ranks samples for their weights, breaks ties, chooses the text."""
    beta: float = 0.0
    """A sample weighs exp(beta · s(u)), u its rank by `score` among the samples, in (0, 1], and s
    `saturated`; 0: all weigh the same, and that is the plain vote."""
    alpha: float | None = None
    """Weigh by p^(alpha − 1) instead, p the probability of the whole text: what power sampling would draw,
    out of samples that are there; 1 is the plain vote."""
    wave: int = 4
    """Samples that are drawn before it is asked whether more are needed."""
    sure: float = 0.95
    """Stop where the leader is ahead with more than this probability; 1: never for that."""

    def __post_init__(self) -> None:
        if self.score not in get_args(Score) or self.beta < 0 or self.wave < 1:
            raise ValueError(f"a vote has no such rules: {self}")

    @property
    def plain(self) -> bool:
        """Whether all samples weigh the same."""
        return self.alpha == 1 if self.alpha is not None else self.beta == 0 or self.score == "none"


@dataclass(frozen=True)
class Decision:
    """What a vote came to."""

    winner: Ballot | None
    """The sample whose text stands for the winning answer; None where none has a vote."""
    votes: int
    """For the winner."""
    drawn: int
    """Samples, those without a vote included."""
    confidence: float
    """The winner's share of the weights; a sample without a vote counts against it, with the mean weight of
    those that have one. In the plain vote it is the agreement. Not calibrated: 4 of 4 and 8 of 8 both are 1.
    """
    answers: int
    """Different ones."""
    entropy: float | None
    """Semantic entropy: of the answers' shares of the weight, nats; None without any vote."""

    @property
    def agreement(self) -> float:
        """The share of the samples that vote for the winner."""
        return self.votes / self.drawn if self.drawn else 0.0


@dataclass(frozen=True)
class Ended:
    """A vote over stored samples, stopped where it would have been while drawing."""

    decision: Decision
    stopped: Stopped


@dataclass(frozen=True)
class _Party:
    """Those that say the same."""

    members: Sequence[Ballot]
    weights: Sequence[float]
    score: Score

    @property
    def weight(self) -> float:
        return math.fsum(self.weights)  # whatever the order

    @property
    def has_greedy(self) -> bool:
        return any(member.sample == 0 for member in self.members)

    @property
    def rank(self) -> tuple[float, bool, float, int]:
        """Larger than any other's: by weight; ties go to greedy's answer, then to the surest single sample,
        then to the earliest."""
        surest = max(_score(member, self.score) for member in self.members)
        return self.weight, self.has_greedy, surest, -min(member.sample for member in self.members)

    @property
    def text(self) -> Ballot:
        """The surest of them, of those whose text is whole if there are any."""
        return max(self.members, key=lambda b: (b.whole, _score(b, self.score), -b.sample))


def decide(ballots: Sequence[Ballot], rules: Rules = Rules()) -> Decision:
    """Count a vote. The order of the ballots does not matter, only their samples' numbers do.

    Raises ValueError where the rules need scores and a ballot has none.
    """
    parties = _parties(ballots, rules)
    if not parties:
        return Decision(None, 0, len(ballots), 0.0, 0, None)
    best = max(parties, key=lambda party: party.rank)
    total = math.fsum(weight for party in parties for weight in party.weights)
    voters = sum(len(party.members) for party in parties)
    shares = [party.weight / total for party in parties]
    return Decision(
        best.text,
        len(best.members),
        len(ballots),
        best.weight * voters / (total * len(ballots)),
        len(parties),
        max(0.0, -math.fsum(share * math.log(share) for share in shares if share > 0)),
    )


def over(ballots: Sequence[Ballot], left: int, rules: Rules = Rules()) -> Stopped | None:
    """Why no more samples are needed; None where they are.

    Args:
        ballots: of all samples so far.
        left: samples that may still be drawn.
    """
    if left == 0:
        return "budget"
    parties = sorted(_parties(ballots, rules), key=lambda party: party.rank, reverse=True)
    if not parties:
        return None
    if _cannot_be_caught(parties, left, rules):
        return "decided"
    second = max((len(party.members) for party in parties[1:]), default=0)
    return "sure" if ahead(len(parties[0].members), second) > rules.sure else None


def ahead(votes: int, second: int) -> float:
    """P(p > 1/2) for p ~ Beta(votes + 1, second + 1): how sure it is that the leader is ahead of the second.

    For whole numbers the incomplete beta function at 1/2 is a sum of binomial coefficients, so this is exact
    up to one rounding.
    """
    n = votes + second + 1
    return sum(math.comb(n, k) for k in range(second + 1, n + 1)) / (1 << n)


def waves(samples: int, size: int) -> Iterator[range]:
    """The samples' numbers, wave by wave; the last one may be smaller."""
    for start in range(0, samples, size):
        yield range(start, min(samples, start + size))


def replay(ballots: Sequence[Ballot], rules: Rules = Rules()) -> Ended:
    """The vote over stored samples as it would have been: wave by wave, until it is over."""
    if not ballots:
        raise ValueError("a vote needs at least one sample")
    ordered = sorted(ballots, key=lambda ballot: ballot.sample)
    for wave in waves(len(ordered), rules.wave):
        so_far = ordered[: wave.stop]
        stopped = over(so_far, len(ordered) - wave.stop, rules)
        if stopped is not None:
            break
    assert stopped is not None  # at the end at the latest
    return Ended(decide(so_far, rules), stopped)


def repeated(tokens: Sequence[int]) -> float:
    """The share of a text's `GRAM`-grams of tokens that occurred in it before; 0 for shorter texts."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_whole(finish_reason: str, repeats: float) -> bool:
    """Whether a text came to its own end and does not loop. `repeats`: see `repeated`."""
    return finish_reason == "stop" and repeats <= LOOPS


def saturated(u: float) -> float:
    """s(u) = 1 − (1 − min(u / 0.75, 1))²: what a rank u in (0, 1] is worth."""
    return 1 - (1 - min(u / SATURATED, 1)) ** 2


# -------------------------------------------------------------------------------------------------- weights


def _parties(ballots: Sequence[Ballot], rules: Rules) -> list[_Party]:
    voters = [ballot for ballot in ballots if ballot.key is not None]
    found: dict[Hashable, tuple[list[Ballot], list[float]]] = {}
    for ballot, weight in zip(voters, _weights(voters, rules), strict=True):
        members, weights = found.setdefault(ballot.key, ([], []))
        members.append(ballot)
        weights.append(weight)
    return [_Party(members, weights, rules.score) for members, weights in found.values()]


def _weights(voters: Sequence[Ballot], rules: Rules) -> list[float]:
    if rules.alpha is not None and not rules.plain:
        logs = [(rules.alpha - 1) * _score(ballot, "log-probability") for ballot in voters]
        return [math.exp(log - max(logs)) for log in logs]
    return [_weight(rank / len(voters), rules) for rank in _midranks(voters, rules.score)]


def _weight(u: float, rules: Rules) -> float:
    return 1.0 if rules.plain else math.exp(rules.beta * saturated(u))


def _midranks(voters: Sequence[Ballot], score: Score) -> list[float]:
    """From 1, the least sure, to their number; those that are equally sure share the mean of their ranks."""
    values = [_score(ballot, score) for ballot in voters]
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + bisect_right(ordered, value) + 1) / 2 for value in values]


def _score(ballot: Ballot, score: Score) -> float:
    """The greater, the surer."""
    if score == "none":
        return 0.0
    if ballot.scores is None:
        raise ValueError(f"sample {ballot.sample} has no scores, and {score} is asked for")
    return RANKED[score](ballot.scores)


def _cannot_be_caught(parties: Sequence[_Party], left: int, rules: Rules) -> bool:
    """Whether the first party wins whatever the samples left say.

    With weights by rank, later samples move the ranks of those that are there: of n, a sample at rank r may
    end anywhere from r / (n + left), all others being surer, to (r + left) / (n + left). So this is certain,
    but not the earliest moment. Weights by probability have no bound: one later sample may outweigh all.
    """
    if rules.alpha is not None and not rules.plain:
        return False
    least, *rivals = _bounds(parties, left, rules)
    most = max((high for _, high in rivals), default=0.0) + left * _weight(1.0, rules)
    if rules.plain and least[0] == most:
        return parties[0].has_greedy
    return least[0] > most * (1 + 1e-12)  # rounding


def _bounds(parties: Sequence[_Party], left: int, rules: Rules) -> list[tuple[float, float]]:
    """The least and the most that the samples which are there may weigh in the end, by party."""
    voters = [member for party in parties for member in party.members]
    ranks = dict(zip((v.sample for v in voters), _midranks(voters, rules.score), strict=True))
    end = len(voters) + left

    def total(party: _Party, more: int) -> float:
        return math.fsum(_weight((ranks[member.sample] + more) / end, rules) for member in party.members)

    return [(total(party, 0), total(party, left)) for party in parties]
