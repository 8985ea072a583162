"""Votes on every engine: a vote that stops early equals the beginning of the long vote, draw for draw."""

import pytest

from emlocal.backends.base import Backend
from emlocal.generation import Scheduler
from emlocal.methods import Chosen, Outcome
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.vote import Vote
from emlocal.methods.voting import replay
from emlocal.settings import Plan
from tests.backends.contract import tokens

ASK = "2 + 3 = 5. 4 + 3 = 7. 5 + 3 ="


def vote(backend: Backend, name: str, parallel: int = 1) -> Outcome:
    """Runs a vote. Texts end at the first full stop, or are cut off and then have no vote."""
    chosen = Chosen(name)
    plan = chosen.plan(Plan(max_tokens=8, seed=3, stop=(".", "a", "\n")))
    question = Question(ASK, plan, lambda asked: tokens(backend, str(asked)))
    with Scheduler(backend, parallel) as runner:
        *_, last = ask_one(runner, chosen.collecting, question)
    assert isinstance(last, Answered)
    return last.asking.result()


@pytest.mark.parametrize("name", ["vote:5:wave=2:sure=0.5", "vote:3:wave=1:beta=0"])
def test_a_vote_is_a_beginning_of_the_long_one(backend: Backend, name: str) -> None:
    """Runs one sample at a time, so that every row is computed in the same shape."""
    found, long = vote(backend, name), vote(backend, "vote:5:wave=5:sure=1")
    n = len(found.completions)
    assert [c.draws for c in found.completions] == [c.draws for c in long.completions[:n]]
    assert len(long.completions) == 5
    method = Chosen(name).collecting
    assert isinstance(method, Vote)
    most = Chosen(name).samples
    ballots = [ballot for c in long.completions[:most] if (ballot := method.ballot(c))]
    again = replay(ballots, method.rules)
    assert (again.decision.drawn, again.stopped) == (n, found.fields["stopped"])
    assert again.decision.confidence == found.confidence


def test_the_first_is_greedys_side_by_side_too(backend: Backend) -> None:
    side_by_side, greedy = vote(backend, "vote:4", parallel=4), vote(backend, "greedy")
    assert side_by_side.completions[0].tokens == greedy.completion.tokens
    assert side_by_side.fields["drawn"] == 4
    ballots = [Vote().ballot(c) for c in side_by_side.completions]
    assert side_by_side.undecided == all(ballot is None or ballot.key is None for ballot in ballots)
    best = vote(backend, "em-best:3", parallel=3)
    assert [len(c.draws) > 0 for c in best.completions] == [True] * 3
