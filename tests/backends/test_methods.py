"""Methods with several jobs for an answer, once on each engine."""

import math

import pytest

from emlocal.backends.base import Backend
from emlocal.generation import Completion, Scheduler
from emlocal.methods import Chosen, Outcome
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.power import log_weight
from emlocal.settings import Plan
from tests.backends.contract import tokens


def outcome(backend: Backend, method: str, **plan: int) -> Outcome:
    how = Chosen(method)
    planned = how.plan(Plan(max_tokens=100, **plan))  # type: ignore[arg-type]
    with Scheduler(backend, 3) as runner:
        question = Question("", planned, lambda asked: tokens(backend, "the cat sat on the mat"))
        *_, last = ask_one(runner, how.collecting, question)
    assert isinstance(last, Answered)
    return last.asking.result()


def test_think_em_of_one_way_to_go_on_is_greedy_decoding(backend: Backend) -> None:
    expected = outcome(backend, "greedy").completion
    found = outcome(backend, "think-em:1")
    assert found.fields["steps"] > 1
    assert found.completion.tokens == expected.tokens
    assert found.completion.text == expected.text
    assert found.completion.ends == expected.ends
    for one, other in zip(found.completion.draws, expected.draws, strict=True):
        assert one.entropy_before == pytest.approx(other.entropy_before, abs=1e-3)


def test_think_em_chooses_the_surest_way_to_go_on(backend: Backend) -> None:
    found = outcome(backend, "think-em:3:think-steps=2", seed=4)
    first: list[Completion] = [c for c in found.jobs[0].completions if c.finish_reason != "stop"]

    def entropy(step: Completion) -> float:
        return math.fsum(draw.entropy_before for draw in step.draws) / len(step.draws)

    surest = min(first or found.jobs[0].completions, key=entropy)
    assert found.completion.tokens[: len(surest.tokens)] == surest.tokens
    assert found.generated_tokens > len(found.completion.tokens)
    read = found.timings.prompt_tokens - found.timings.cached_tokens
    assert read <= found.jobs[0].timings.prompt_tokens + 2 * len(found.jobs)  # nothing is read twice


def test_a_particles_weight_depends_on_its_prefix_alone(backend: Backend) -> None:
    """α·log p − log q is log Σ p^α of the row, whichever token was drawn."""
    found = outcome(backend, "power:3:power-block=8", seed=2)
    assert len(found.completions) == 3
    assert all(len(c.draws) - len(c.tokens) == (c.finish_reason == "stop") for c in found.completions)
    first = [log_weight(c.draws[:1], 2.0) for handle in found.jobs[:1] for c in handle.completions]
    assert len(first) == 3
    assert first == pytest.approx([first[0]] * 3, abs=1e-3)
    assert first[0] < 0
    for draw in found.completion.draws:
        assert draw.entropy_after <= draw.entropy_before + 1e-6
