"""behaviour-vote: the decision by clusters, and the whole method on an engine with canned programs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emlocal.backends.fake import END, VOCABULARY, FakeBackend
from emlocal.errors import EmlocalError, UsageError
from emlocal.generation import Scheduler, Token
from emlocal.generation.prompt import prompt_tokens
from emlocal.methods import Chosen, Outcome
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.behaviour_vote import Decision, decide
from emlocal.sandbox import landlock, run
from emlocal.sandbox.canonical import canonical
from emlocal.settings import Plan, SamplingParams
from tests.evaluation.data import contained
from tests.examples import examples

RESULTS = st.sampled_from(["returns 1", "returns 2", "raises ValueError", "out of time"])
ROWS = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.tuples(*[RESULTS] * n), min_size=1, max_size=8),
        st.tuples(*[st.sampled_from([None, (1,), (2,)])] * n),
    )
)


def flat(n: int) -> list[float]:
    return [0.0] * n


@examples(400)
@given(ROWS)
def test_the_winner_is_of_the_greatest_cluster(
    case: tuple[list[tuple[str, ...]], tuple[tuple[object] | None, ...]],
) -> None:
    rows, _ = case
    got = decide(dict(enumerate(rows)), [None] * len(rows[0]), flat(len(rows)))
    used = [i for i in range(len(rows[0])) if any(row[i].startswith("returns") for row in rows)]
    rows = [tuple(row[i] for i in used) for row in rows]
    able = [row for row in rows if any(each.startswith("returns") for each in row)]
    assert got.undecided == (not able)
    if able:
        most = max(map(able.count, able))
        assert able.count(rows[got.index]) == most == got.cluster
        assert got.behaviours == len(set(able))
        if able.count(rows[0]) == most:
            assert got.index == 0
    assert got.inputs == len(used)


@examples(400)
@given(ROWS, st.randoms())
def test_the_order_of_the_samples_changes_nothing_else(
    case: tuple[list[tuple[str, ...]], tuple[tuple[object] | None, ...]], random: Any
) -> None:
    rows, expected = case
    order = [0, *random.sample(range(1, len(rows)), len(rows) - 1)]  # the greedy one stays first
    certainty = [float(-i) for i in range(len(rows))]
    a = decide(dict(enumerate(rows)), expected, certainty)
    b = decide({i: rows[j] for i, j in enumerate(order)}, expected, [certainty[j] for j in order])
    assert order[b.index] == a.index
    assert replace(b, index=a.index) == a


@examples(400)
@given(ROWS)
def test_none_that_meets_fewer_expectations_wins(
    case: tuple[list[tuple[str, ...]], tuple[tuple[object] | None, ...]],
) -> None:
    rows, expected = case

    def met(row: Sequence[str]) -> int:
        return sum(e is not None and got == f"returns {e[0]}" for got, e in zip(row, expected, strict=True))

    got = decide(dict(enumerate(rows)), expected, flat(len(rows)))
    best = max(map(met, rows))
    if not got.undecided:
        assert met(rows[got.index]) == best
    assert got.ruled_out == sum(met(row) < best for row in rows)


ONE, TWO, BAD = ["returns 1"], ["returns 2"], ["raises TypeError"]


@pytest.mark.parametrize(
    ("results", "expected", "certainty", "decision"),
    [
        ({0: ONE, 1: TWO, 2: TWO}, None, [0, -2, -1], Decision(2, 2, 2, 1, 0)),
        ({0: ONE, 1: TWO}, None, [-9, -1], Decision(0, 1, 2, 1, 0)),  # a tie goes to the greedy one
        ({0: [], 1: []}, None, [-9, -1], Decision(0, 0, 0, 0, 0, undecided=True)),
        ({1: [], 2: []}, None, [0, -9, -1], Decision(2, 0, 0, 0, 0, undecided=True)),
        ({}, None, [0.0], Decision(0, 0, 0, 0, 0, undecided=True)),
        ({1: ONE, 2: TWO}, None, [0, -2, -1], Decision(2, 1, 2, 1, 0)),  # then to the most certain
        # failing programs are no answer
        ({0: BAD, 1: BAD, 2: ONE}, None, [0, 0, 0], Decision(2, 1, 1, 1, 0)),
        ({0: BAD, 1: BAD}, None, [0, 0], Decision(0, 0, 0, 0, 0, undecided=True)),
        ({0: TWO, 1: TWO, 2: ONE}, (1,), [0, 0, 0], Decision(2, 1, 1, 1, 2)),
        ({0: TWO, 1: TWO, 2: ONE}, (3,), [0, 0, 0], Decision(0, 2, 2, 1, 0)),  # all contradict it
    ],
)
def test_who_wins(
    results: Mapping[int, list[str]],
    expected: tuple[object] | None,
    certainty: list[float],
    decision: Decision,
) -> None:
    inputs = max(map(len, results.values()), default=0)
    assert decide(results, [expected] * inputs, certainty) == decision


@pytest.mark.parametrize(
    ("result", "expected", "out"),
    [
        ("returns 0.333333333", 0.33, 0),
        ("returns 0.34", 0.33, 1),
        ("returns 0.5", 0.5, 0),
        ("returns 0.52", 0.5, 1),
        ("returns 3", 3.0, 0),
        ("returns 'x'", 0.33, 1),
        ("returns [1, 2]", [1, 2], 0),
        ("returns (1, 2, )", [1, 2], 1),
        ("returns None", None, 0),
        ("out of time", 1, 1),
    ],
)
def test_what_contradicts_an_example(result: str, expected: object, out: int) -> None:
    right = f"returns {canonical(expected)}"
    found = decide({0: [result], 1: [right], 2: [right]}, [(expected,)], flat(3))
    assert found.ruled_out == out


PROGRAMS = {
    "a": "def f(n):\n    return n * n",
    "b": "def f(n):\n    total = 0\n    for _ in range(n):\n        total += n\n    return total",
    "c": "def f(n):\n    return n + n",
    "d": "def f(n):\n    while True: pass",
    "e": "def f(n):\n    print('x' * 10**7)\n    exit()",
    "g": "def f(n):\n    return f(n)",
    "h": "Sorry, no.",
}
"""Programs by the letter that an answer begins with. `a` and `b` do the same for n ≥ 0."""


def engine(weights: Mapping[str, float], inputs: str) -> FakeBackend:
    """Answers with these programs, as often as the logits say, and then with the inputs."""

    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        text = bytes(t for t in tokens if t < END).decode()
        _, *turns = text.split("[assistant]")
        said = turns[-1]
        row = np.full(VOCABULARY, -30.0, dtype=np.float32)
        if len(turns) == 1 and not said:
            for letter, logit in weights.items():
                row[ord(letter)] = logit
            return row
        reply = inputs
        if len(turns) == 1:
            code = PROGRAMS[said[0]]
            reply = said[0] + (f"\n```python\n{code}\n```" if code.startswith("def") else code)
        row[reply.encode()[len(said)] if len(said) < len(reply) else END] = 10.0
        return row

    return FakeBackend(script, context=4000, sequences=12, shared=False)


def ask(
    weights: Mapping[str, float],
    *,
    prompt: str = "Write f.",
    inputs: str = "(2,)\n(3,)",
    n: int = 8,
    seed: int = 1,
    most: int | None = None,
    **own: Any,
) -> Outcome:
    """Runs the method; `most`: Ctrl-C comes after this many tokens."""
    method = Chosen("behaviour-vote", samples=n, allow_code=True, **own)
    base = Plan(params=SamplingParams(temperature=1.0, min_p=0.0), seed=seed, max_tokens=300)
    plan = method.plan(base, frozenset({"temperature", "min_p"}))
    backend = engine(weights, inputs)
    question = Question([{"role": "user", "content": prompt}], plan, partial(prompt_tokens, backend), key=1)
    seen: list[Token] = []
    with Scheduler(backend, 8) as runner:
        for event in ask_one(
            runner, method.collecting, question, lambda: most is not None and len(seen) >= most
        ):
            if isinstance(event, Token):
                seen.append(event)
            if isinstance(event, Answered):
                return event.asking.result()
    raise AssertionError


def letters(outcome: Outcome) -> str:
    return "".join(completion.text[0] for completion in outcome.completions)


@contained
def test_programs_that_do_the_same_vote_together() -> None:
    outcome = ask({"c": 0.1, "a": 0.0, "b": 0.0}, inputs="(2,)\n(3,)\n({},)", n=12, seed=5)
    drawn = letters(outcome)
    alike = sum(drawn.count(letter) for letter in "ab")
    assert drawn[0] == "c"  # the greedy one
    assert alike > drawn.count("c") > 0
    assert drawn[outcome.index] in "ab"
    assert outcome.fields == {
        "programs": 12, "cluster": alike, "behaviours": 2, "inputs": 2, "ruled_out": 0,
    }  # fmt: skip
    assert outcome.confidence == alike / 12
    assert len(outcome.jobs) == 2
    assert outcome.generated_tokens > sum(len(c.tokens) for c in outcome.completions)


@contained
def test_the_first_sample_is_greedy_and_the_others_are_those_of_the_plan() -> None:
    outcome = ask({"a": 0.5, "b": 0.0, "c": 0.0, "h": 0.0})
    [drawn, inputs] = (handle.job for handle in outcome.jobs)
    assert [request.params.temperature for request in drawn.requests] == [0.0, *[1.0] * 7]
    assert letters(outcome)[0] == "a"
    assert [request.params.temperature for request in inputs.requests] == [0.0]
    assert outcome.fields["programs"] == 8 - letters(outcome).count("h")


@contained
def test_programs_that_misbehave_lose() -> None:
    outcome = ask({"d": 0.5, "e": 0.0, "g": 0.0, "a": 0.0, "b": 0.0})
    drawn = letters(outcome)
    assert set("deg") & set(drawn)
    assert drawn[outcome.index] in "ab"
    assert outcome.fields["inputs"] == 2


@contained
@pytest.mark.parametrize(("use", "winner"), [(True, "ab"), (False, "c")])
def test_examples_of_the_prompt_rule_out_or_do_not(use: bool, winner: str) -> None:
    outcome = ask({"c": 2.0, "a": 0.0, "b": 0.0}, prompt="Write f, such as f(3) == 9.", use_examples=use)
    drawn = letters(outcome)
    assert drawn.count("c") > 4
    assert drawn[outcome.index] in winner
    assert outcome.fields["ruled_out"] == (drawn.count("c") if use else 0)
    assert outcome.fields["inputs"] == 2


@contained
@pytest.mark.parametrize("inputs", ["I cannot.", "({},)\n(None,)", ""])
def test_without_usable_inputs_the_answer_is_greedys(inputs: str) -> None:
    outcome = ask({"c": 0.2, "a": 0.0, "b": 0.0}, inputs=inputs)
    assert outcome.undecided
    assert (outcome.index, outcome.confidence) == (0, None)
    assert outcome.fields["inputs"] == 0
    assert outcome.fields["programs"] == 8


@contained
def test_inputs_that_do_not_fit_the_context_are_done_without() -> None:
    outcome = ask({"c": 0.2, "a": 0.0, "b": 0.0}, prompt="x" * 3800 + " f(3) == 9")
    assert len(outcome.jobs) == 1
    assert letters(outcome)[outcome.index] in "ab"


@contained
def test_one_program_for_all_is_not_run() -> None:
    outcome = ask({"a": 0.0}, prompt="Write f, such as f(3) == 10.")
    assert outcome.fields == {"programs": 8, "cluster": 8, "behaviours": 1, "inputs": 0, "ruled_out": 0}
    assert (outcome.confidence, outcome.index, len(outcome.jobs)) == (1.0, 0, 1)


@contained
def test_no_program_at_all_is_undecided() -> None:
    outcome = ask({"h": 0.0})
    assert outcome.undecided
    assert outcome.fields["programs"] == 0


@contained
def test_a_program_is_better_than_none() -> None:
    outcome = ask({"h": 0.1, "a": 0.0}, n=6)
    assert letters(outcome)[0] == "h"
    assert letters(outcome)[outcome.index] == "a"


@contained
@pytest.mark.parametrize("after", [-60, -1, 0, 3])
def test_when_it_is_stopped_nothing_is_run_and_the_answer_is_greedys(after: int) -> None:
    weights = {"c": 0.2, "a": 0.0, "b": 0.0}
    whole = ask(weights)
    stopped = ask(weights, most=sum(len(c.draws) for c in whole.completions) + after)
    assert not whole.undecided
    assert (stopped.undecided, stopped.index, stopped.fields["inputs"]) == (True, 0, 0)
    assert whole.completions[0].text.startswith(stopped.completion.text)


def test_it_needs_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="behaviour-vote runs code that the model writes") as refused:
        Chosen("behaviour-vote:4").plan(Plan())
    assert "--allow-code" in refused.value.hint
    if landlock.abi() >= landlock.OLDEST_ABI:
        Chosen("behaviour-vote:4:allow-code=true").plan(Plan())
    monkeypatch.setattr(run.landlock, "abi", lambda: 0)
    with pytest.raises(EmlocalError, match="cannot contain generated code"):
        Chosen("behaviour-vote:4", allow_code=True).plan(Plan())


@contained
@pytest.mark.parametrize(
    ("weights", "prompt", "said"),
    [
        ({"c": 0.5, "a": 0.0, "b": 0.0}, "f(3) == 9", "of 8 programs agree on 2 inputs"),
        ({"c": 0.5, "a": 0.0, "b": 0.0}, "f(3) == 9", "contradict the prompt's examples"),
        ({"a": 0.0}, "f(3) == 9", "8 of 8 programs are the same text"),
        ({"h": 0.0}, "f(3) == 9", "no programs to choose from"),
    ],
)
def test_what_people_are_told(weights: Mapping[str, float], prompt: str, said: str) -> None:
    assert said in " · ".join(ask(weights, prompt=prompt).said)


@pytest.mark.skipif(landlock.abi() < landlock.OLDEST_ABI, reason="needs Landlock (Linux 6.2)")
def test_others_are_drawn_at_08_where_nobody_chose() -> None:
    method = Chosen("behaviour-vote", allow_code=True)
    model = Plan(params=SamplingParams(temperature=0.2, min_p=0.0, top_k=20))
    assert method.plan(model).params == SamplingParams(temperature=0.8, min_p=0.05, top_k=20)
    assert method.plan(model, frozenset({"temperature"})).params.temperature == 0.2


def test_one_program_cannot_vote() -> None:
    with pytest.raises(UsageError, match="at least 2 programs"):
        Chosen("behaviour-vote", samples=1)
    assert Chosen("behaviour-vote").samples == 8


def test_greedy_samples_cannot_vote() -> None:
    with pytest.raises(UsageError, match="all alike"):
        Chosen("behaviour-vote").collecting.check(SamplingParams(temperature=0.0))
