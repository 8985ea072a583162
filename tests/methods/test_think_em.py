"""Think-EM: the definition of a step, the choice of one, and joining the parts into one answer."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emlocal.backends.fake import END, VOCABULARY, FakeBackend, hashed
from emlocal.cancel import never
from emlocal.chat.session import ChatSession
from emlocal.chat.talk import Turn
from emlocal.errors import CancelledError, ContextFullError, UsageError
from emlocal.generation import Completed, Completion, Scheduler, joined
from emlocal.generation.prompt import Asked
from emlocal.methods import Chosen, Outcome
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.think_em import LONGEST, SHORTEST, step_ends
from emlocal.settings import EMInf, Plan, SamplingParams
from emlocal.settings.resolve import resolve_settings
from tests.batch.batches import row, rows, settings, timeless

Script = Callable[[Sequence[int]], NDArray[np.float32]]


def encode(asked: Asked) -> list[int]:
    assert isinstance(asked, str)
    return list(asked.encode())


def wordy(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Returns any bytes, mostly letters, ends of sentences and half characters: steps end everywhere."""
    found = hashed(tokens)
    for byte in b"abcdefg .\n" + bytes("é√".encode()):
        found[byte] += 6
    found[END] += 3
    return found


def outcome(
    method: str,
    *,
    script: Script = wordy,
    cancelled: Callable[[], bool] = never,
    context: int = 512,
    heard: list[list[Completion]] | None = None,
    params: SamplingParams = SamplingParams(),
    **plan: Any,
) -> Outcome:
    """Returns a method's outcome; `heard`: the completions of each job."""
    how = Chosen(method)
    planned = how.plan(Plan(params, **{"max_tokens": 120, **plan}), frozenset(plan))
    with Scheduler(FakeBackend(script, sequences=12, shared=False, context=context), 8) as runner:
        question = Question("why?", planned, encode, key=3)
        for event in ask_one(runner, how.collecting, question, cancelled):
            if isinstance(event, Answered):
                found = event.asking.result()
    if heard is not None:
        heard += [list(job.completions) for job in found.jobs]
    return found


# ----------------------------------------------------------------------------------------- parts and steps


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("He has three apples.", True),
        ("He has three apples. ", True),
        ("He has three apples, and", False),
        ("so that is all\n", True),
        ("    return x\n    ", True),
        ("What is it?", True),
        ('"Stop!"', True),
        ("(as above.)", True),
        ("**Therefore.**", True),
        ("それは三です。", True),
        ("It costs 3.", False),  # 3.50
        ("1.", False),
        ("It costs $3!", True),
        ("It ends. Then", False),
    ],
)
def test_where_a_step_ends(text: str, ends: bool) -> None:
    assert step_ends(text, SHORTEST) is ends
    assert not step_ends(text, SHORTEST - 1)
    assert step_ends(text, LONGEST)


def pieces(whole: Completion, cuts: Sequence[int]) -> list[Completion]:
    """Cuts the answer into parts, but never within a character."""
    bounds = [0, *cuts, len(whole.tokens)]
    parts = []
    for first, last in pairwise(bounds):
        begin, end = (whole.ends[i - 1] if i else 0 for i in (first, last))
        is_last = last == len(whole.tokens)
        parts.append(
            Completion(
                7,
                whole.text[begin:] if is_last else whole.text[begin:end],
                whole.tokens[first:last],
                whole.draws[first:] if is_last else whole.draws[first:last],
                [e - begin for e in whole.ends[first:last]],
                whole.finish_reason if is_last else "pause",
                whole.stop if is_last else None,
            )
        )
    return parts


@given(st.sets(st.integers(1, 40), max_size=4), st.sampled_from([(), (".",), ("b ", "a.\n")]))
def test_parts_are_joined_to_the_whole(cuts: set[int], stop: tuple[str, ...]) -> None:
    whole = outcome("greedy", stop=stop).completion
    whole.tail = ""
    ends = [0, *whole.ends]
    good = [
        c
        for c in sorted(cuts)
        if c < len(whole.tokens) and ends[c] <= len(whole.text) and ends[c - 1] < ends[c]
    ]
    assert joined(pieces(whole, good)) == whole


@given(
    st.integers(1, 9),
    st.integers(1, 120),
    st.sampled_from([(), ("\n",), (".", "a b"), ("é",), ("\ufffd",), ("zzzz",), (".\n",), ("a\nb", "b.c")]),
    st.booleans(),
    st.sampled_from([wordy, hashed]),
)
def test_of_one_way_to_go_on_it_is_greedy_decoding(
    steps: int, most: int, stop: tuple[str, ...], penalties: bool, script: Script
) -> None:
    """Bit for bit: text, tokens, statistics of each draw, and the finish reason."""
    settings = SamplingParams(em=EMInf(), repeat_penalty=1.3 if penalties else 1.0)
    more: dict[str, Any] = {"params": settings, "max_tokens": most, "stop": stop, "script": script}
    found = outcome(f"think-em:1:think-steps={steps}", **more)
    expected = outcome(
        "em-inf", **{**more, "params": SamplingParams(**{**vars(settings), "temperature": 0.0})}
    )
    found.completion.tail = expected.completion.tail = ""  # the late part of the text does not matter
    assert found.completion == expected.completion
    assert found.fields["changed_steps"] == 0
    assert found.generated_tokens == len(found.completion.tokens)


def test_the_steps_are_whole_characters_and_no_stop_string_is_cut() -> None:
    heard: list[list[Completion]] = []
    found = outcome("think-em:3:think-steps=9", heard=heard, stop=("\nab", "c.d"), max_tokens=300)
    paused = [c for job in heard for c in job if c.finish_reason == "pause"]
    assert len(paused) > 8
    for step in paused:
        assert step.text == bytes(step.tokens).decode(errors="replace")  # nothing is pending …
        assert not step.text.endswith(("\n", "\na", "c", "c."))  # … nor may it become a stop string
        assert len(step.tokens) >= SHORTEST
    assert found.completion.text == bytes(found.completion.tokens).decode(errors="replace")


# ------------------------------------------------------------------------------------------ which is kept


def entropy(step: Completion) -> float:
    return sum(draw.entropy_before for draw in step.draws) / len(step.draws)


def surprisal(step: Completion) -> float:
    return -sum(float(np.log(draw.p_before)) for draw in step.draws) / len(step.draws)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("think-em:5", entropy),
        ("think-em:5:think-score=log-probability", surprisal),
        ("think-em:5:think-choice=least-sure", lambda step: -entropy(step)),
    ],
)
def test_the_best_of_each_step_is_kept(name: str, least: Callable[[Completion], float], seed: int) -> None:
    heard: list[list[Completion]] = []
    found = outcome(name, heard=heard, seed=seed)
    taken = found.fields["steps"]
    steps, rest = heard[:taken], [job[0] for job in heard[taken:]]
    kept: list[Completion] = []
    for number, step in enumerate(steps):
        said = {" ".join(k.text.split()) for k in kept}
        fine = [
            c for c in step if " ".join(c.text.split()) not in said and (number or c.finish_reason != "stop")
        ]
        kept.append(min(fine, key=least))
    assert taken == 4 or kept[-1].finish_reason == "stop"
    assert found.completion.draws == joined([*kept, *rest]).draws
    assert found.fields["considered_tokens"] == sum(len(c.tokens) for step in steps for c in step)
    others = [k.tokens != step[0].tokens for k, step in zip(kept, steps, strict=True)]
    assert found.fields["changed_steps"] == sum(others)


def test_a_random_choice_is_addressed() -> None:
    random = "think-em:4:think-choice=random"
    texts = [outcome(random, seed=seed).completion.text for seed in range(6)]
    assert texts == [outcome(random, seed=seed).completion.text for seed in range(6)]
    indices = []
    for seed in range(40):
        heard: list[list[Completion]] = []
        found = outcome(random + ":think-steps=1", seed=seed, heard=heard)
        first = [i for i, c in enumerate(heard[0]) if found.completion.tokens[: len(c.tokens)] == c.tokens]
        indices += first[:1]
    assert {0, 1, 2, 3} == set(indices)  # P(one is missing in 40) < 5e-5


def test_greedys_step_is_greedy_and_the_others_are_drawn_anew_in_each_step() -> None:
    heard: list[list[Completion]] = []
    flat = lambda tokens: np.zeros(VOCABULARY, dtype=np.float32)  # noqa: E731
    outcome("think-em:3", script=flat, heard=heard, max_tokens=300)
    *steps, _ = heard
    assert all(set(step[0].tokens) == {0} for step in steps)
    assert len({tuple(c.tokens) for step in steps for c in step[1:]}) == 8
    greedy = outcome("greedy", script=flat).completion
    assert steps[0][0].draws == greedy.draws[: len(steps[0][0].draws)]


def telling(first: dict[str, float], then: dict[str, dict[str, float]]) -> Script:
    """Returns a script that says one of the texts of `first`, then one that follows on all that was said.

    Each has its logit at the first byte, in which they differ; from there on the script is certain.
    """

    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        said = bytes(t for t in tokens if t < END).decode().removeprefix("why?")
        found = np.full(VOCABULARY, -60, dtype=np.float32)
        options = first
        while (begun := next((t for t in options if t and said.startswith(t)), None)) is not None:
            said, options = said[len(begun) :], then.get(begun, {"": 0.0})
        for text, logit in options.items():
            if text.startswith(said):
                found[ord(text[len(said)]) if len(said) < len(text) else END] = 0.0 if said else logit
        return found

    return script


def test_a_step_that_was_said_before_loses() -> None:
    again = {"one two three.\n": 1.5, "four five six.\n": 0.0}
    script = telling({"one two three.\n": 0.0}, {"one two three.\n": again, "four five six.\n": {"": 0.0}})
    text = outcome(
        "think-em:8:think-steps=2", script=script, params=SamplingParams(min_p=0.0)
    ).completion.text
    assert text == "one two three.\nfour five six.\n"
    greedy = outcome("greedy", script=script, max_tokens=60).completion.text
    assert greedy == "one two three.\n" * 4


def test_an_answer_that_ends_in_the_first_step_loses() -> None:
    script = telling({"no": 0.5, "let us think.\n": 0.0}, {"let us think.\n": {"yes": 0.0}, "no": {"": 0.0}})
    assert outcome("greedy", script=script).completion.text == "no"
    assert outcome("think-em:8", script=script).completion.text == "let us think.\nyes"
    alone = outcome("think-em:8", script=telling({"no": 0.0}, {"no": {"": 0.0}}))
    assert (alone.completion.text, alone.completion.finish_reason) == ("no", "stop")
    assert alone.fields == {"steps": 1, "changed_steps": 0, "considered_tokens": 16}


# ------------------------------------------------------------------------------------------- how it ends


def after(looks: int) -> Callable[[], bool]:
    seen = 0

    def cancelled() -> bool:
        nonlocal seen
        seen += 1
        return seen > looks

    return cancelled


def test_cancelled_it_has_what_was_said_so_far() -> None:
    whole = outcome("think-em:3", script=hashed, seed=2)
    heard: list[list[Completion]] = []
    lengths = set()
    for looks in range(3, 160, 7):
        heard.clear()
        found = outcome("think-em:3", script=hashed, seed=2, cancelled=after(looks), heard=heard)
        completion = found.completion
        lengths.add(len(completion.tokens))
        if completion.finish_reason != "cancelled":
            assert completion == whole.completion
            continue
        own = (
            heard[-1][0].tokens if len(heard) > found.fields["steps"] else []
        )  # the beginning of greedy's step
        chosen = completion.tokens[: len(completion.tokens) - len(own)]
        assert completion.tokens == chosen + own
        assert whole.completion.tokens[: len(chosen)] == chosen
    assert len(lengths) > 5
    with pytest.raises(CancelledError):
        outcome("think-em:3", cancelled=after(0))


def silent(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Like `hashed`, but never ends."""
    return np.where(np.arange(VOCABULARY) == END, -60, hashed(tokens)).astype(np.float32)


def test_a_full_context_ends_it_with_what_there_is() -> None:
    for script, steps in (
        (silent, 0),
        (lambda tokens: np.where(silent(tokens) < -50, -60, wordy(tokens)), 2),
    ):
        found = outcome("think-em:3", script=script, context=60, max_tokens=500)
        assert (found.completion.finish_reason, len(found.completion.tokens)) == ("context", 57)
        assert found.fields["steps"] >= steps
    with pytest.raises(ContextFullError):
        outcome("think-em:3", context=4)


def test_where_the_room_is_shared_and_holds_one_answer_it_goes_on_alone() -> None:
    how = Chosen("think-em:4")
    with Scheduler(FakeBackend(silent, context=130), 4) as runner:
        question = Question("why?", how.plan(Plan(max_tokens=100)), encode)
        *_, last = ask_one(runner, how.collecting, question)
    assert isinstance(last, Answered)
    found = last.asking.result()
    assert found.fields["steps"] == 0
    assert (found.completion.finish_reason, len(found.completion.tokens)) == ("length", 100)
    assert found.completion.tokens == outcome("greedy", script=silent, max_tokens=100).completion.tokens


@pytest.mark.parametrize("most", [1, 7, 30, 64, 65, 100])
def test_the_limit_is_the_whole_answers(most: int) -> None:
    found = outcome("think-em:3", script=silent, max_tokens=most).completion
    assert (len(found.tokens), found.finish_reason) == (most, "length")


# ------------------------------------------------------------------------------------ where it is asked


ASK = {"custom_id": "a", "prompt": "hi"}


def test_rows_have_its_fields_and_parallel_ones_are_the_same() -> None:
    lines = [{"custom_id": f"q{i}", "prompt": "x" * (i * 31 % 70)} for i in range(1, 8)]
    how = settings(Chosen("think-em:3"), SamplingParams(), max_tokens=150)
    found = rows(lines, how, script=wordy, parallel=5)
    assert timeless(found) == timeless(rows(lines, how, script=wordy, parallel=1))
    for each in found:
        assert each["method"] == "think-em"
        assert 1 <= each["steps"] <= 4
        assert 0 <= each["changed_steps"] <= each["steps"]
        assert each["considered_tokens"] <= each["completion_tokens"]
        assert "samples" not in each
    openai = row([ASK], settings(Chosen("think-em:3"), openai=True), script=wordy)["response"]["body"]
    assert openai["choices"][0]["finish_reason"] in ("stop", "length")
    assert openai["emlocal"]["steps"] >= 1


def test_in_a_chat() -> None:
    backend = FakeBackend(wordy)
    session = ChatSession(backend, Scheduler(backend, 4))
    how = Chosen("think-em:4")
    turn = Turn(how.plan(Plan(max_tokens=60)), how)
    events: Iterator[Any] = session.ask("why?", turn, never)
    assert sum(isinstance(event, Completed) for event in events) > 4
    assert session.last is not None
    said = session.last.completion
    assert session.conversation.exchanges == [("why?", said.text)]
    assert session.context_used == len("[user]why?\n[assistant]") + len(said.tokens)
    list(session.ask_again(turn, never))
    assert session.conversation.exchanges != [("why?", said.text)]


def test_draws_are_its_own_where_nobody_chose_otherwise() -> None:
    how = Chosen("think-em")
    own = {"temperature": 0.3, "top_k": 20, "top_p": 0.8, "repeat_penalty": 1.1}
    resolved = resolve_settings(("flag", {"top_p": 0.9})).with_model(own)
    plan = how.plan(resolved.plan, resolved.chosen)
    expected = SamplingParams(temperature=0.8, min_p=0.05, top_p=0.9, repeat_penalty=1.1)
    assert (plan.params, plan.samples) == (expected, 4)
    flat = Chosen("sample:1+think-em:2").plan(resolved.plan, resolved.chosen)
    assert (flat.params.temperature, flat.params.min_p, flat.samples) == (1.0, 0.0, 2)
    em = Chosen("em-inf+think-em").plan(resolved.plan, resolved.chosen).params
    assert (em.em, em.temperature) == (EMInf(), 0.3)
    line = Chosen("think-em").params(SamplingParams(temperature=0.1), frozenset({"temperature"}))
    assert line.temperature == 0.1


def test_what_it_says_of_itself_and_refuses() -> None:
    how = Chosen("think-em:3:think-steps=2:think-score=log-probability")
    assert how.collecting.describe(3) == ["2 steps, the most certain of 3 by log-probability, then greedy"]
    random = Chosen("think-em", think_choice="random").collecting
    assert random.describe(4) == ["4 steps, a random one of 4, then greedy"]
    assert how.identity()["think-score"] == "log-probability"
    with pytest.raises(UsageError, match="at temperature 0"):
        how.collecting.check(SamplingParams(temperature=0.0))
    with pytest.raises(UsageError, match="--think-steps is 0"):
        Chosen("think-em:2:think-steps=0")
    with pytest.raises(UsageError, match="--think-choice belongs to --method think-em"):
        Chosen("greedy", think_choice="random")
