"""The vote as a pure function: weights, ties, stopping, for any ballots."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import beta as beta_law
from scipy.stats import rankdata

from emlocal.answers.meaning import majority
from emlocal.em.scores import RANKED, Scores, scores
from emlocal.methods.voting import (
    Ballot,
    Rules,
    Score,
    ahead,
    decide,
    is_whole,
    over,
    repeated,
    replay,
    saturated,
    waves,
)


def scored(entropy: float, probability: float = 0.5) -> Scores:
    return scores([entropy], [probability])


@st.composite
def ballots_of(draw: Callable[..., Any], least: int = 1, most: int = 12, first: int = 0) -> list[Ballot]:
    """Draws few answers and few scores, so that there are ties of all kinds."""
    said = st.tuples(st.sampled_from("abcd") | st.none(), st.integers(0, 5), st.integers(1, 4), st.booleans())
    drawn = draw(st.lists(said, min_size=least, max_size=most))
    return [
        Ballot(i, key, key or "", scored(h / 4, p / 4), whole)
        for i, (key, h, p, whole) in enumerate(drawn, start=first)
    ]


RULES = st.builds(
    Rules,
    score=st.sampled_from(get_args(Score)),
    beta=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    alpha=st.sampled_from([None, None, None, 1.0, 2.0, 4.0]),
    wave=st.integers(1, 5),
    sure=st.sampled_from([0.5, 0.8, 0.95, 1.0]),
)
MEAN = Rules(score="mean-entropy", beta=1.0)


def test_its_scores_are_those_that_there_are() -> None:
    assert set(get_args(Score)) == {"none", *RANKED}


@pytest.mark.parametrize("wrong", [{"beta": -1.0}, {"wave": 0}, {"score": "entropy"}])
def test_rules_without_a_meaning(wrong: Any) -> None:
    with pytest.raises(ValueError, match="rules of a vote are out of range"):
        Rules(**wrong)


# ------------------------------------------------------------------------------------------ the plain vote


@given(ballots_of())
def test_without_score_it_is_the_majority(ballots: list[Ballot]) -> None:
    """The earliest of the largest classes, and its first member, as in self-consistency."""
    whole = [dataclasses.replace(ballot, whole=True) for ballot in ballots]
    found = decide(whole)
    index = majority([ballot.key and str(ballot.key) for ballot in whole])
    if index is None:
        assert found.winner is None
        return
    assert found.winner == whole[index]
    assert found.votes == sum(ballot.key == whole[index].key for ballot in whole)


@given(ballots_of(), st.sampled_from(get_args(Score)))
def test_weights_of_nothing_are_the_plain_vote(ballots: list[Ballot], score: Score) -> None:
    """Bit for bit: beta 0, alpha 1, and a plain count."""
    found = decide(ballots, Rules(score, beta=0.0))
    assert decide(ballots, Rules(score, beta=3.0, alpha=1.0)) == found
    assert decide(ballots, Rules(score)) == found
    counts = Counter(ballot.key for ballot in ballots if ballot.key is not None)
    if not counts:
        assert (found.winner, found.votes, found.confidence, found.entropy) == (None, 0, 0.0, None)
        return
    assert found.winner is not None
    assert found.votes == counts[found.winner.key] == max(counts.values())
    assert found.confidence == found.agreement == found.votes / len(ballots)
    assert found.answers == len(counts)
    shares = [n / sum(counts.values()) for n in counts.values()]
    assert found.entropy == pytest.approx(-sum(p * math.log(p) for p in shares), abs=1e-12)
    tied = {key for key, n in counts.items() if n == found.votes}
    if ballots[0].key in tied:
        assert found.winner.key == ballots[0].key


@given(ballots_of(), RULES, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(ballots: list[Ballot], rules: Rules, random: Any) -> None:
    other = [*ballots]
    random.shuffle(other)
    assert decide(other, rules) == decide(ballots, rules)
    assert over(other, 3, rules) == over(ballots, 3, rules)
    assert replay(other, rules) == replay(ballots, rules)


@given(ballots_of(), RULES, st.permutations("abcd"))
def test_other_names_for_the_answers_change_nothing_else(
    ballots: list[Ballot], rules: Rules, names: Sequence[str]
) -> None:
    called = dict(zip("abcd", names, strict=True))
    other = [dataclasses.replace(b, key=b.key and called[str(b.key)]) for b in ballots]
    found, expected = decide(other, rules), decide(ballots, rules)
    assert dataclasses.replace(found, winner=None) == dataclasses.replace(expected, winner=None)
    assert (found.winner and found.winner.sample) == (expected.winner and expected.winner.sample)


# ------------------------------------------------------------------------------------------------- weights


@given(ballots_of(), st.sampled_from([*RANKED]), st.sampled_from([0.3, 1.0, 4.0]))
def test_weights_are_what_the_formula_says(ballots: list[Ballot], score: Score, beta: float) -> None:
    voters = [ballot for ballot in ballots if ballot.key is not None]
    assume(voters)
    ranks = rankdata([RANKED[score](ballot.scores) for ballot in voters if ballot.scores])
    weight: Counter[Any] = Counter()
    for ballot, rank in zip(voters, ranks, strict=True):
        u = min(rank / len(voters) / 0.75, 1)
        weight[ballot.key] += math.exp(beta * (1 - (1 - u) ** 2))
    found = decide(ballots, Rules(score, beta))
    assert found.winner is not None
    assert weight[found.winner.key] == pytest.approx(max(weight.values()))
    share = max(weight.values()) / sum(weight.values())
    assert found.confidence == pytest.approx(share * len(voters) / len(ballots))
    assert 0 < found.confidence <= 1
    assert 0 <= (found.entropy or 0) <= math.log(found.answers) + 1e-12


@given(ballots_of(), st.sampled_from([1.5, 2.0, 4.0]))
def test_weights_by_probability(ballots: list[Ballot], alpha: float) -> None:
    weight: Counter[Any] = Counter()
    for ballot in ballots:
        if ballot.key is not None and ballot.scores is not None:
            weight[ballot.key] += math.exp(ballot.scores.log_probability) ** (alpha - 1)
    assume(weight)
    found = decide(ballots, Rules("log-probability", alpha=alpha))
    assert found.winner is not None
    assert weight[found.winner.key] == pytest.approx(max(weight.values()))


def test_probabilities_too_small_for_a_float_still_weigh() -> None:
    long = scores([0.1] * 400, [0.01] * 400)  # e^-1842
    longer = scores([0.1] * 400, [0.009] * 400)
    ballots = [Ballot(0, "a", "a", longer), Ballot(1, "b", "b", long), Ballot(2, "a", "a", longer)]
    found = decide(ballots, Rules("log-probability", alpha=2.0))
    assert found.winner == ballots[1]
    assert found.confidence == pytest.approx(1)


@given(ballots_of())
def test_only_the_ranks_count(ballots: list[Ballot]) -> None:
    """Any rising function of the scores gives the same vote."""
    other = [
        dataclasses.replace(b, scores=b.scores and scored(math.exp(3 * b.scores.mean_entropy)))
        for b in ballots
    ]
    ours, theirs = decide(ballots, MEAN), decide(other, MEAN)
    assert dataclasses.replace(ours, winner=None) == dataclasses.replace(theirs, winner=None)
    assert (ours.winner and ours.winner.sample) == (theirs.winner and theirs.winner.sample)


def test_a_surer_minority_wins_by_its_weights() -> None:
    entropies = {0: 2.0, 1: 0.1, 2: 1.9, 3: 0.2, 4: 1.8}
    ballots = [Ballot(i, "b" if i in (1, 3) else "a", "", scored(h)) for i, h in entropies.items()]
    assert decide(ballots, Rules("mean-entropy", 0.0)).winner == ballots[4]  # the most certain of a's three
    assert decide(ballots, Rules("mean-entropy", 0.3)).winner == ballots[4]
    found = decide(ballots, Rules("mean-entropy", 4.0))
    assert found.winner == ballots[1]
    assert (found.votes, found.agreement) == (2, 0.4)
    assert found.confidence > 0.5


def test_saturation() -> None:
    assert [saturated(u) for u in (0.75, 0.9, 1.0)] == [1.0, 1.0, 1.0]
    assert saturated(0.375) == 0.75
    assert saturated(1e-9) == pytest.approx(0, abs=1e-8)


# --------------------------------------------------------------------------------------- ties and the text


def test_ties_go_to_greedy_then_to_the_surest_single_then_to_the_earliest() -> None:
    a0, b1, b2, a3 = (
        Ballot(i, key, "", scored(h)) for i, key, h in [(0, "a", 3), (1, "b", 1), (2, "b", 2), (3, "a", 2)]
    )
    plain = Rules("mean-entropy")
    assert decide([a0, b1, b2, a3], plain).winner == a3  # greedy's answer, by its most certain text
    assert decide([b1, b2, a3, Ballot(4, "a", "", scored(0.5))], plain).winner == Ballot(
        4, "a", "", scored(0.5)
    )
    assert (
        decide([b1, b2, a3, Ballot(4, "a", "", scored(1.0))], plain).winner == b1
    )  # equally certain: the earliest
    # the greedy one has no vote; the largest class wins
    assert decide([Ballot(0), a3, b2, b1], plain).winner == b1


def test_the_text_is_the_surest_of_the_whole_ones() -> None:
    ballots = [
        Ballot(0, "a", "7", scored(0.5)),
        Ballot(1, "a", "7.0", scored(0.1), whole=False),
        Ballot(2, "a", "07", scored(0.3)),
    ]
    assert decide(ballots, MEAN).winner == ballots[2]
    assert decide(ballots[1:2], MEAN).winner == ballots[1]
    assert decide(ballots).winner == ballots[0]  # without a score, the first: greedy's


def test_a_score_that_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match="sample 1 has no scores, but the vote needs mean-entropy"):
        decide([Ballot(0, "a", "", scored(1)), Ballot(1, "a")], MEAN)
    # without a vote it needs no score
    assert decide([Ballot(0, "a", "", scored(1)), Ballot(1)], MEAN).votes == 1
    assert decide([Ballot(0, "a"), Ballot(1, "a")]).agreement == 1


def test_nothing_to_count() -> None:
    assert decide([]).agreement == 0
    assert over([], 4) is None
    with pytest.raises(ValueError, match="at least one sample"):
        replay([])


# -------------------------------------------------------------------------------------------------- stopping


@given(st.integers(0, 200), st.integers(0, 200))
def test_ahead_is_the_beta_law(votes: int, second: int) -> None:
    assert ahead(votes, second) == pytest.approx(beta_law.sf(0.5, votes + 1, second + 1), rel=1e-9)


@given(st.integers(0, 24), st.integers(0, 24))
def test_ahead_is_even_between_equals_and_the_rest_for_the_other(votes: int, second: int) -> None:
    assert ahead(votes, second) + ahead(second, votes) == pytest.approx(1)
    assert ahead(votes, votes) == 0.5
    assert ahead(votes + 1, second) > ahead(votes, second) > ahead(votes, second + 1)


def test_four_of_four_are_enough_and_three_of_three_are_not() -> None:
    assert ahead(4, 0) == 31 / 32
    assert ahead(3, 0) == 15 / 16
    assert over([Ballot(i, "a") for i in range(4)], 9) == "sure"
    assert over([Ballot(i, "a") for i in range(3)], 9) is None
    assert over([Ballot(i, "a") for i in range(4)], 9, Rules(sure=1.0)) is None


@given(ballots_of(most=6), st.integers(1, 3), RULES, st.data())
def test_a_leader_that_cannot_be_caught_wins_whatever_follows(
    ballots: list[Ballot], left: int, rules: Rules, data: Any
) -> None:
    """Whatever the other samples say: old or new answers, more or less certain, with or without a vote."""
    assume(over(ballots, left, rules) == "decided")
    more = data.draw(ballots_of(least=left, most=left, first=len(ballots)))
    before, after = decide(ballots, rules), decide([*ballots, *more], rules)
    assert before.winner is not None
    assert after.winner is not None
    assert after.winner.key == before.winner.key


@given(ballots_of(most=5), st.integers(1, 3))
def test_the_plain_vote_stops_as_early_as_it_can(ballots: list[Ballot], left: int) -> None:
    """If not decided, some continuation lets another answer win; a tie, by being more certain."""
    rules = Rules("mean-entropy", sure=1.0)
    winner = decide(ballots, rules).winner
    if winner is None or over(ballots, left, rules) == "decided":
        return
    keys = ["a", "b", "c", "d", "new"]
    n, surest = len(ballots), scored(-1)
    rests = product(keys, repeat=left)
    ends = [
        decide([*ballots, *(Ballot(n + i, key, "", surest) for i, key in enumerate(rest))], rules).winner
        for rest in rests
    ]
    assert any(end is not None and end.key != winner.key for end in ends)


def test_weighted_votes_are_decided_too() -> None:
    """The bound is useful: with beta 1, four of four out of six cannot be caught."""
    ballots = [Ballot(i, "a", "", scored(i)) for i in range(4)]
    assert over(ballots, 2, Rules("mean-entropy", 1.0, sure=1.0)) == "decided"
    assert over(ballots, 2, Rules("mean-entropy", 4.0, sure=1.0)) is None  # e^4 is too much to promise
    assert over(ballots, 2, Rules("mean-entropy", alpha=2.0, sure=1.0)) is None


def test_greedy_settles_a_tie_beforehand() -> None:
    plain = Rules(sure=1.0)
    assert over([Ballot(0, "a"), Ballot(1, "a")], 2, plain) == "decided"
    assert over([Ballot(0), Ballot(1, "a"), Ballot(2, "a")], 2, plain) is None


def test_a_weighted_leader_with_fewer_votes_is_not_sure() -> None:
    ballots = [Ballot(i, "a", "", scored(9)) for i in range(6)] + [Ballot(6, "b", "", scored(0))]
    rules = Rules("mean-entropy", alpha=None, beta=100.0, sure=0.5)
    found = decide(ballots, rules)
    assert found.winner is not None
    assert found.winner.key == "b"
    assert over(ballots, 50, rules) is None


@given(st.integers(1, 40), st.integers(1, 50))
def test_waves_are_all_samples_in_their_order(samples: int, size: int) -> None:
    found = list(waves(samples, size))
    assert [i for wave in found for i in wave] == list(range(samples))
    assert all(len(wave) == size for wave in found[:-1])


@given(ballots_of(), RULES)
def test_a_stopped_vote_is_a_beginning_of_the_long_one(ballots: list[Ballot], rules: Rules) -> None:
    found = replay(ballots, rules)
    n = found.decision.drawn
    assert found.decision == decide(ballots[:n], rules)
    assert n == len(ballots) or n % rules.wave == 0
    assert (found.stopped == "budget") == (n == len(ballots))
    for earlier in range(rules.wave, n, rules.wave):
        assert over(ballots[:earlier], len(ballots) - earlier, rules) is None
    longer = replay([*ballots, *(dataclasses.replace(b, sample=b.sample + 100) for b in ballots)], rules)
    assert longer.decision.drawn >= n - n % rules.wave


@given(ballots_of())
def test_a_lossless_stop_loses_nothing(ballots: list[Ballot]) -> None:
    found, whole = replay(ballots, Rules(wave=2, sure=1.0)).decision, decide(ballots)
    assert (found.winner and found.winner.key) == (whole.winner and whole.winner.key)


# ----------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([1, 1, 1], 0.0),
        ([1, 1, 1, 1], 0.0),
        ([1, 1, 1, 1, 1], 0.5),
        ([1, 2, 3, 4, 5, 6, 7, 8], 0.0),
        ([1, 2, 3, 4] * 10, 33 / 37),
    ],
)
def test_repeated_grams(tokens: list[int], share: float) -> None:
    assert repeated(tokens) == pytest.approx(share)


@given(st.lists(st.integers(0, 2), max_size=30))
def test_repeated_is_what_it_says(tokens: list[int]) -> None:
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    seen = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repeated(tokens) == pytest.approx(seen / len(grams) if grams else 0)


def test_whole_texts() -> None:
    assert is_whole("stop", 0.5)
    assert not is_whole("stop", 0.51)
    assert not any(is_whole(reason, 0.0) for reason in ("length", "context", "cancelled"))
