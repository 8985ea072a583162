"""The tokens of the answer proper."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.backends.fake import FakeBackend, saying
from emlocal.generation import Completion, Scheduler
from emlocal.generation.prompt import prompt_tokens
from emlocal.methods import Chosen
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.scoring import answer_span, scores_of, tokens_of
from emlocal.settings import Plan, SamplingParams
from tests.examples import examples


@examples(300)
@given(st.data())
def test_tokens_of_a_span_are_those_that_wrote_in_it(data: st.DataObject) -> None:
    """A token may have several characters, or only begin one that a later token ends."""
    ends, writers = [0], []  # writers: the last token of each character
    begun: list[int] = []
    for token in range(data.draw(st.integers(1, 8))):
        width = data.draw(st.integers(0, 3))
        ends.append(ends[-1] + width)
        for i in range(width):
            writers.append([*begun, token] if i == 0 else [token])
        begun = [] if width else [*begun, token]
    if not writers:
        return
    first = data.draw(st.integers(0, len(writers) - 1))
    behind = data.draw(st.integers(first + 1, len(writers)))
    expected = sorted({token for character in writers[first:behind] for token in character})
    found = tokens_of(ends[1:], (first, behind))
    assert list(range(*found.indices(len(ends) - 1))) == expected


@pytest.mark.parametrize(
    ("text", "proper"),
    [
        ("First \\boxed{3}, no: \\boxed{42}. That is 7 more.", "42"),
        ("So 3 + 4 = 7. Or 17 - 10 = 7 apples", "7"),
        ("It is $1,200.", "$1,200"),
        ("I do not know.", None),
        ("```python\ndef f():\n    return 1\n```\nThis has 2 lines.", "def f():\n    return 1\n"),
        ("```\na\n```\nor\n```\nb\n", "b\n"),
        ("", None),
    ],
)
def test_where_the_answer_stands(text: str, proper: str | None) -> None:
    span = answer_span(text)
    assert (None if span is None else text[slice(*span)]) == proper
    if span is not None and proper == "7":
        assert span[0] == text.rindex("7")


def test_a_box_is_not_taken_for_what_is_said_after_it() -> None:
    text = "First \\boxed{42}, no: \\boxed{42}. That is 42 more."
    assert answer_span(text) == (text.rindex("{42") + 1, text.rindex("{42") + 3)


def answer(text: str) -> Completion:
    backend = FakeBackend(saying(text))
    plan = Plan(SamplingParams(temperature=0.0), 200)
    question = Question("hi", plan, lambda asked: prompt_tokens(backend, [{"role": "user", "content": "hi"}]))
    for event in ask_one(Scheduler(backend, 1), Chosen().collecting, question):
        if isinstance(event, Answered):
            return event.asking.result().completion
    raise AssertionError


def test_entropy_of_the_answer_is_that_of_its_tokens() -> None:
    """Here a token is a byte, and é has two."""
    done = answer("Né à 20 ans: \\boxed{4é2}!")
    start = "Né à 20 ans: \\boxed{".encode().__len__()
    own = [draw.entropy_before for draw in done.draws[start : start + 4]]
    found = scores_of(done)
    assert found is not None
    assert found.answer_entropy == pytest.approx(sum(own) / 4)
    assert found.tokens == len(done.draws) == len(done.tokens) + 1  # and the end token


def test_an_answer_without_tokens_has_no_scores() -> None:
    assert scores_of(Completion(0)) is None
