"""Thoughts on the engine without a model: what is shown, counted, forced, constrained and sharpened."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emlocal.backends.fake import CHAT_TEMPLATE, END, VOCABULARY, FakeBackend, saying
from emlocal.generation import Completion, Finished, Job, Request, Scheduler, Token
from emlocal.generation.sample import joined, reasoning_json
from emlocal.generation.thinking import Reasoning
from emlocal.methods.asking import Question
from emlocal.sampling import SamplingParams, Uniforms
from emlocal.settings import EMInf, Plan
from emlocal.settings.constraint import Constraint

THINKS = CHAT_TEMPLATE + "{# </think> #}"
OPENS = CHAT_TEMPLATE.replace("[assistant]", "[assistant]<think>\n") + "{# </think> #}"
SAID = "<think>\nIt may be 3.\n</think>\n\nFour."
GREEDY = SamplingParams(temperature=0)


def backend(reply: str = SAID, template: str = THINKS, **more: Any) -> FakeBackend:
    return FakeBackend(saying(reply, sharpness=60), chat_template=template, sequences=6, shared=False, **more)


def answer(
    engine: FakeBackend,
    prompt: str = "[user]what?\n[assistant]",
    *,
    reasoning: Reasoning | None = Reasoning(),
    **more: Any,
) -> tuple[Completion, list[Token]]:
    request = Request(
        **{"params": GREEDY, "uniforms": Uniforms(0, 0, 0), "max_tokens": 200, **more}, reasoning=reasoning
    )
    with Scheduler(engine, 4) as runner:
        events = [*runner.follow([Job(list(prompt.encode()), [request])])]
    last = events[-1]
    assert isinstance(last, Finished)
    return last.handle.result()[0], [event for event in events if isinstance(event, Token)]


def test_a_thought_is_apart_as_it_streams_and_in_the_end() -> None:
    done, tokens = answer(backend())
    assert (done.reasoning, done.text, done.finish_reason) == ("It may be 3.", "Four.", "stop")
    assert "".join(token.text for token in tokens) + done.tail == "Four."
    assert "".join(token.reasoning for token in tokens) == "It may be 3."
    assert done.reasoning_tokens == len("<think>\nIt may be 3.\n</think>")
    assert done.ends[-1] == len("Four.")
    assert len(done.tokens) == len(SAID)


def test_without_reasoning_or_marks_nothing_is_apart() -> None:
    for engine, reasoning in ((backend(), None), (backend(template=CHAT_TEMPLATE), Reasoning())):
        done, _ = answer(engine, reasoning=reasoning)
        assert (done.text, done.reasoning, done.reasoning_tokens) == (SAID, "", 0)
        assert reasoning_json(done) == {}


def test_the_prompt_may_open_the_thought() -> None:
    def after(tokens: Sequence[int]) -> NDArray[np.float32]:
        text = bytes(t for t in tokens if t < END).partition(b"<think>\n")[2]
        reply, row = b"It may be 3.</think>Four.", np.zeros(VOCABULARY, dtype=np.float32)
        row[reply[len(text)] if len(text) < len(reply) else END] = 60
        return row

    engine = FakeBackend(after, chat_template=OPENS, sequences=6, shared=False)
    done, _ = answer(engine, "[user]what?\n[assistant]<think>\n")
    assert (done.reasoning, done.text) == ("It may be 3.", "Four.")
    assert done.reasoning_tokens == len("It may be 3.</think>")


def test_a_thought_that_never_ends_leaves_no_answer() -> None:
    done, _ = answer(backend(), max_tokens=12)
    assert (done.text, done.reasoning, done.finish_reason) == ("", "It m", "length")
    assert done.reasoning_tokens == 12


def test_stop_strings_do_not_act_in_thoughts() -> None:
    done, _ = answer(backend("<think>a. b.</think>c. d."), stop=(".",))
    assert (done.reasoning, done.text, done.stop) == ("a. b.", "c", ".")


@pytest.mark.parametrize("budget", [0, 1, 9, 20])
def test_a_budget_ends_the_thought(budget: int) -> None:
    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        """Thinks for ever; answers once the thought is closed."""
        text = bytes(t for t in tokens if t < END).decode(errors="replace").rpartition("[assistant]")[2]
        _, closed, said = text.partition("</think>\n\n")
        reply = "Four." if closed else "<think>" + "hm, " * 99
        row = np.zeros(VOCABULARY, dtype=np.float32)
        have = said if closed else text
        row[ord(reply[len(have)]) if len(have) < len(reply) else END] = 60
        return row

    engine = FakeBackend(script, chat_template=THINKS, sequences=6, shared=False)
    done, _ = answer(engine, reasoning=Reasoning(budget))
    assert (done.text, done.finish_reason) == ("Four.", "stop")
    thought = ("<think>" + "hm, " * 99)[: max(budget, len("<think>"))].removeprefix("<think>")
    assert done.reasoning == thought.strip()


def test_a_constraint_holds_for_the_answer_alone() -> None:
    number = Constraint("regex", "[0-9]+")
    thoughtful = backend("<think>no digits</think>12")
    done, _ = answer(thoughtful, constraint=number)
    # where the opening mark takes several tokens, as here, the constraint leaves no room for a thought
    assert (done.reasoning, done.text.isdigit(), done.complete) == ("", True, True)
    inside = FakeBackend(saying("x"), chat_template=OPENS, sequences=6, shared=False)
    done, _ = answer(
        inside, "[user]what?\n[assistant]<think>\n", constraint=number, reasoning=Reasoning(3), max_tokens=40
    )
    assert done.text.isdigit()
    assert done.reasoning_tokens > 3


@pytest.mark.parametrize("where", ["all", "thought", "answer"])
def test_em_steps_where_they_are_wanted(where: Any) -> None:
    plan = Plan(SamplingParams(temperature=0, em=EMInf(threshold=0.0)), max_tokens=200, em_where=where)
    asked = Question(
        [{"role": "user", "content": "what?"}], plan, lambda _: list(b"[user]what?\n[assistant]")
    )
    engine = FakeBackend(saying(SAID, sharpness=6), chat_template=THINKS, sequences=6, shared=False)
    with Scheduler(engine, 4) as runner:
        *_, last = runner.follow([asked.job()])
    assert isinstance(last, Finished)
    done = last.handle.result()[0]
    n = done.reasoning_tokens
    steps = [draw.steps > 0 for draw in done.draws]
    # the tokens of the opening mark are not known to be a thought's before it is whole
    thought, said = steps[len("<think>") : n], steps[n:]
    assert all(thought) is (where != "answer")
    assert all(said) is (where != "thought")
    assert any(said) is (where != "thought")


def test_parts_of_a_sample_know_where_they_are() -> None:
    """A method that goes on from a paused sample finds the thought where it was."""
    whole, _ = answer(backend())
    for cut in range(1, len(whole.tokens)):
        prompt = list(b"[user]what?\n[assistant]")
        first, _ = answer(backend(), max_tokens=cut)
        request = Request(
            GREEDY, Uniforms(0, 0, 0, cut), 200 - cut, begun=tuple(first.tokens), reasoning=Reasoning()
        )
        with Scheduler(backend(), 4) as runner:
            *_, last = runner.follow([Job([*prompt, *first.tokens], [request])])
        assert isinstance(last, Finished)
        rest = last.handle.result()[0]
        both = joined([first, rest])
        assert both.tokens == whole.tokens
        assert both.reasoning_tokens == whole.reasoning_tokens
        assert rest.text == whole.text or both.text.strip() == whole.text


def test_json_has_the_parts_apart() -> None:
    done, _ = answer(backend())
    found = reasoning_json(done)
    assert (found["reasoning"], found["reasoning_tokens"]) == ("It may be 3.", done.reasoning_tokens)
    assert found["entropy_of"]["answer"].keys() == found["entropy_of"]["reasoning"].keys()


def test_the_questions_plan_reaches_the_request() -> None:
    plan = Plan(think_budget=7, em_where="thought")
    asked = Question([{"role": "user", "content": "q"}], plan, lambda _: [1])
    assert [request.reasoning for request in asked.job().requests] == [Reasoning(7)]
    assert replace(asked, asked="raw").job().requests[0].reasoning is None
