"""The result of a vote, and when it stops: pure functions of the samples' answers, without an engine.

A method calls them while it draws (`vote.Vote`). They also work on stored answers: the same votes can be
decided by another score, with other weights, in other waves or for fewer samples, without asking the model
again.

    ballots = [Ballot(0, canonical("18"), "18", scores), Ballot(1), Ballot(2, canonical("3"), "3", others)]
    decide(ballots, Rules(score="mean-entropy", beta=0.5)).winner
    replay(ballots, Rules(sure=1.0)).stopped

Sources: the vote is self-consistency (arXiv 2203.11171), saturated ranks as weights come from arXiv
2608.14420, and the Beta rule of stopping is that of Adaptive-Consistency (arXiv 2305.11860).
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
"""Why a vote stopped.

decided: the leader cannot be caught; sure: it is ahead with the wanted probability; budget: all samples are
drawn; cancelled: Ctrl-C.
"""
SATURATED = 0.75
"""Rank (share of less certain samples) from which on the weight no longer grows."""
GRAM = 4
"""Length, in tokens, of a sequence that counts as repeated."""
LOOPS = 0.5
"""Largest share of repeated sequences in a text that does not count as a loop."""


@dataclass(frozen=True)
class Ballot:
    """The vote of one sample."""

    sample: int
    """Number of the sample; 0 is the greedy one."""
    key: Hashable | None = None
    """Equal for answers with the same meaning; None: the sample has no vote."""
    answer: str = ""
    """The answer as it was written."""
    scores: Scores | None = None
    """Scores of the sample; all rules with a score need them."""
    whole: bool = True
    """Whether the text was not cut off and does not loop."""


@dataclass(frozen=True)
class Rules:
    """Rules for counting and stopping a vote. Raises ValueError for meaningless values."""

    score: Score = "none"
    """Score that ranks the samples for their weights, breaks ties and chooses the text."""
    beta: float = 0.0
    """Strength of the weights.

    A sample weighs exp(beta · s(u)); u in (0, 1] is its rank by `score` among the samples, and s is
    `saturated`. With 0 all weigh the same, which is the plain vote.
    """
    alpha: float | None = None
    """If set, a sample weighs p^(alpha − 1) instead, with p the probability of the whole text.

    This approximates power sampling with existing samples. 1 is the plain vote.
    """
    wave: int = 4
    """Number of samples drawn before each check whether more are needed."""
    sure: float = 0.95
    """Stop when the leader is ahead with more than this probability; 1: never stop for that reason."""

    def __post_init__(self) -> None:
        if self.score not in get_args(Score) or self.beta < 0 or self.wave < 1:
            raise ValueError(f"these rules of a vote are out of range: {self}")

    @property
    def plain(self) -> bool:
        """Whether all samples weigh the same."""
        return self.alpha == 1 if self.alpha is not None else self.beta == 0 or self.score == "none"


@dataclass(frozen=True)
class Decision:
    """The result of a vote."""

    winner: Ballot | None
    """The sample whose text stands for the winning answer; None if no sample has a vote."""
    votes: int
    """Number of votes for the winner."""
    second: int
    """Number of votes for the strongest other answer."""
    drawn: int
    """Number of samples, including those without a vote."""
    confidence: float
    """The winner's share of the weights.

    A sample without a vote counts against it, with the mean weight of the voters. In the plain vote this is
    the agreement. It is not calibrated: 4 of 4 and 8 of 8 both give 1.
    """
    answers: int
    """Number of different answers."""
    entropy: float | None
    """Semantic entropy in nats, that of the answers' shares of the weight; None without any vote."""

    @property
    def agreement(self) -> float:
        """The share of the samples that vote for the winner."""
        return self.votes / self.drawn if self.drawn else 0.0

    @property
    def margin(self) -> float:
        """The winner's share of the samples minus the second's; negative if the weights decided otherwise."""
        return (self.votes - self.second) / self.drawn if self.drawn else 0.0


@dataclass(frozen=True)
class Ended:
    """A vote over stored samples, stopped where it would have stopped while drawing."""

    decision: Decision
    stopped: Stopped


@dataclass(frozen=True)
class _Party:
    """The ballots with the same answer."""

    members: Sequence[Ballot]
    weights: Sequence[float]
    score: Score

    @property
    def weight(self) -> float:
        return math.fsum(self.weights)  # exact in any order

    @property
    def has_greedy(self) -> bool:
        return any(member.sample == 0 for member in self.members)

    @property
    def rank(self) -> tuple[float, bool, float, int]:
        """Sort key; the largest wins.

        It compares weights. Ties go to the greedy answer, then to the most certain single sample, then to the
        earliest.
        """
        surest = max(_score(member, self.score) for member in self.members)
        return self.weight, self.has_greedy, surest, -min(member.sample for member in self.members)

    @property
    def text(self) -> Ballot:
        """The most certain ballot; whole texts come first."""
        return max(self.members, key=lambda b: (b.whole, _score(b, self.score), -b.sample))


def decide(ballots: Sequence[Ballot], rules: Rules = Rules()) -> Decision:
    """Counts a vote. The order of the ballots does not matter, only the numbers of their samples.

    Raises ValueError if the rules need scores and a ballot has none.
    """
    parties = _parties(ballots, rules)
    if not parties:
        return Decision(None, 0, 0, len(ballots), 0.0, 0, None)
    best = max(parties, key=lambda party: party.rank)
    total = math.fsum(weight for party in parties for weight in party.weights)
    voters = sum(len(party.members) for party in parties)
    shares = [party.weight / total for party in parties]
    return Decision(
        best.text,
        len(best.members),
        max((len(party.members) for party in parties if party is not best), default=0),
        len(ballots),
        best.weight * voters / (total * len(ballots)),
        len(parties),
        max(0.0, -math.fsum(share * math.log(share) for share in shares if share > 0)),
    )


def over(ballots: Sequence[Ballot], left: int, rules: Rules = Rules()) -> Stopped | None:
    """Returns why no more samples are needed, or None if they are.

    Args:
        ballots: of all samples so far.
        left: number of samples that may still be drawn.
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
    """Returns P(p > 1/2) for p ~ Beta(votes + 1, second + 1): the probability that the leader is ahead.

    For whole numbers the incomplete beta function at 1/2 is a sum of binomial coefficients, so this is exact
    up to one rounding.
    """
    n = votes + second + 1
    return sum(math.comb(n, k) for k in range(second + 1, n + 1)) / (1 << n)


def waves(samples: int, size: int) -> Iterator[range]:
    """Yields the samples' numbers wave by wave; the last wave may be smaller."""
    for start in range(0, samples, size):
        yield range(start, min(samples, start + size))


def replay(ballots: Sequence[Ballot], rules: Rules = Rules()) -> Ended:
    """Decides a vote over stored samples wave by wave, as if they were being drawn, until it stops."""
    if not ballots:
        raise ValueError("a vote needs at least one sample")
    ordered = sorted(ballots, key=lambda ballot: ballot.sample)
    for wave in waves(len(ordered), rules.wave):
        so_far = ordered[: wave.stop]
        stopped = over(so_far, len(ordered) - wave.stop, rules)
        if stopped is not None:
            break
    assert stopped is not None  # the last wave always stops it
    return Ended(decide(so_far, rules), stopped)


def repeated(tokens: Sequence[int]) -> float:
    """Returns the share of a text's `GRAM`-grams of tokens that occurred before; 0 for shorter texts."""
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_whole(finish_reason: str, repeats: float) -> bool:
    """Whether a text ended by itself and does not loop. `repeats`: see `repeated`."""
    return finish_reason == "stop" and repeats <= LOOPS


def saturated(u: float) -> float:
    """Returns the value of a rank u in (0, 1]: s(u) = 1 − (1 − min(u / 0.75, 1))²."""
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
    """Returns ranks from 1 (least certain) to the number of voters; equal scores share their mean rank."""
    values = [_score(ballot, score) for ballot in voters]
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + bisect_right(ordered, value) + 1) / 2 for value in values]


def _score(ballot: Ballot, score: Score) -> float:
    """Returns a ballot's score; greater means more certain."""
    if score == "none":
        return 0.0
    if ballot.scores is None:
        raise ValueError(f"sample {ballot.sample} has no scores, but the vote needs {score} is asked for")
    return RANKED[score](ballot.scores)


def _cannot_be_caught(parties: Sequence[_Party], left: int, rules: Rules) -> bool:
    """Whether the first party wins whatever the remaining samples say.

    With weights by rank, later samples move the ranks of earlier ones. Of n samples, one at rank r may end
    anywhere from r / (n + left), if all others are more certain, to (r + left) / (n + left). The bound is
    therefore safe, but it may stop later than possible. Weights by probability have no bound: a single later
    sample may outweigh all others.
    """
    if rules.alpha is not None and not rules.plain:
        return False
    least, *rivals = _bounds(parties, left, rules)
    most = max((high for _, high in rivals), default=0.0) + left * _weight(1.0, rules)
    if rules.plain and least[0] == most:
        return parties[0].has_greedy
    return least[0] > most * (1 + 1e-12)  # allows for rounding


def _bounds(parties: Sequence[_Party], left: int, rules: Rules) -> list[tuple[float, float]]:
    """Returns the minimum and maximum final weight of the existing samples, by party."""
    voters = [member for party in parties for member in party.members]
    ranks = dict(zip((v.sample for v in voters), _midranks(voters, rules.score), strict=True))
    end = len(voters) + left

    def total(party: _Party, more: int) -> float:
        return math.fsum(_weight((ranks[member.sample] + more) / end, rules) for member in party.members)

    return [(total(party, 0), total(party, left)) for party in parties]
