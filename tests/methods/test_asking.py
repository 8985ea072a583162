"""Requests of methods to a question: samples in several jobs, and answers continued from a beginning."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.backends.fake import END, FakeBackend
from emlocal.generation import Completion, Job, Scheduler
from emlocal.generation.prompt import Asked
from emlocal.methods.asking import Question
from emlocal.sampling import SamplingParams
from emlocal.settings import Plan

PLAN = Plan(
    params=SamplingParams(temperature=1.0, min_p=0.0, logit_bias=((END, -3.0),)),
    samples=6,
    seed=5,
    max_tokens=24,
)


def encode(asked: Asked) -> list[int]:
    assert isinstance(asked, str)
    return list(asked.encode())


QUESTION = Question("why?", PLAN, encode, key=3)


def done(job: Job) -> Sequence[Completion]:
    backend = FakeBackend(sequences=12, shared=False, context=256)
    with Scheduler(backend, 8) as runner:
        handle = runner.submit(job)
        while not runner.idle:
            runner.step()
    return handle.result()


@given(st.integers(0, 5), st.integers(1, 6))
def test_samples_asked_for_apart_are_those_of_the_whole(first: int, n: int) -> None:
    wanted = range(first, min(6, first + n))
    apart = done(QUESTION.job(samples=wanted))
    assert [c.sample for c in apart] == list(wanted)
    assert [c.draws for c in apart] == [done(QUESTION.job())[i].draws for i in wanted]


@given(st.integers(0, 5), st.integers(1, 23))
def test_an_answer_goes_on_as_if_it_had_not_stopped(sample: int, cut: int) -> None:
    whole = done(QUESTION.job())[sample]
    begun = whole.tokens[:cut]
    job = QUESTION.job(samples=range(sample, sample + 1), after=begun)
    if len(begun) < cut or len(begun) == len(whole.draws):  # it had already finished
        return
    [rest] = done(job)
    assert [*begun, *rest.tokens] == whole.tokens
    assert rest.draws == whole.draws[cut:]
    assert rest.finish_reason == whole.finish_reason


@pytest.mark.parametrize(("asked", "after", "most"), [(None, 0, 24), (8, 0, 8), (None, 20, 4), (8, 20, 4)])
def test_no_more_tokens_than_the_plan_has(asked: int | None, after: int, most: int) -> None:
    job = QUESTION.job(after=[65] * after, max_tokens=asked)
    assert {request.max_tokens for request in job.requests} == {most}


def test_other_settings_for_some_samples() -> None:
    greedy = QUESTION.job(samples=range(1), params=SamplingParams(temperature=0.0))
    assert [request.params.temperature for request in greedy.requests] == [0.0]


@pytest.mark.parametrize("stop", [(), ("e",), ("zz",)])
def test_ends_say_which_token_wrote_which_characters(stop: tuple[str, ...]) -> None:
    make: Callable[[], Question] = lambda: Question("why?", Plan(**{**vars(PLAN), "stop": stop}), encode, 3)  # noqa: E731
    for completion in done(make().job()):
        assert len(completion.ends) == len(completion.tokens)
        assert completion.ends == sorted(completion.ends)
        written = bytes(completion.tokens).decode(errors="replace")
        assert completion.ends[-1] in (len(written), len(written) - 1)  # half a character comes at the end
        assert written.startswith(completion.text)
