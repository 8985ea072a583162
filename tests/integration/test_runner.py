"""The runner on llama.cpp: equality as far as its arithmetic allows, and nothing is read twice."""

from collections.abc import Iterator

import numpy as np
import pytest

from emlocal.backends.base import LoadOptions
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.chat.session import ChatSession
from emlocal.chat.talk import Turn
from emlocal.generation import Handle, Job, Request, Scheduler
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.models.resolve import GGUFModel
from emlocal.sampling import SamplingParams, Uniforms
from emlocal.settings import EMInf, Plan

EM = SamplingParams(em=EMInf(), temperature=1.0, min_p=0.0)


@pytest.fixture
def eight(tiny_model: GGUFModel) -> Iterator[LlamaCppBackend]:
    options = LoadOptions(context=128, sequences=8 + SPARE_SEQUENCES, shared=False, threads=1)
    backend = LlamaCppBackend(tiny_model, options)
    yield backend
    backend.close()


def jobs(lengths: list[int], limits: list[int]) -> list[Job]:
    rng = np.random.default_rng(0)
    return [
        Job(rng.integers(3, 290, n).tolist(), [Request(EM, Uniforms(2, i), most)])
        for i, (n, most) in enumerate(zip(lengths, limits, strict=True))
    ]


def work_off(runner: Scheduler) -> None:
    while not runner.idle:
        runner.step()


def test_one_of_eight_is_cancelled_at_the_same_batch_shapes(eight: LlamaCppBackend) -> None:
    """Bit for bit, including entropies and probabilities of every draw of the seven others."""
    lengths, limits = [9, 30, 17, 5, 22, 14, 40, 11], [40, 33, 40, 28, 40, 36, 40, 40]
    found = []
    for cancelled in (True, False):
        with Scheduler(eight, 8) as runner:
            own = [*limits[:5], limits[5] if cancelled else 12, *limits[6:]]
            handles = [runner.submit(job) for job in jobs(lengths, own)]
            while handles[5].timings.generated_tokens < 12:
                runner.step()
            if cancelled:
                runner.cancel(handles[5])
            work_off(runner)
            found.append([handle.completions[0].draws for handle in handles])
    assert found[0] == found[1]
    assert len(found[0][5]) == 12


@pytest.mark.parametrize("shared", [False, True])
def test_beside_others_a_job_says_what_it_says_alone(tiny_model: GGUFModel, shared: bool) -> None:
    """Equal as far as sums in another order allow: the same tokens, and probabilities to 2e-3."""
    backend = LlamaCppBackend(tiny_model, LoadOptions(context=256, sequences=6, shared=shared, threads=1))
    try:
        some = jobs([12, 25, 7, 18], [10, 14, 20, 8])
        alone = []
        for job in some:
            with Scheduler(backend, 1) as runner:
                handle = runner.submit(job)
                work_off(runner)
                alone.append(handle.completions[0])
        with Scheduler(backend, 3) as runner:
            handles = [runner.submit(job) for job in some[:2]]
            for _ in range(4):
                runner.step()
            handles += [runner.submit(job) for job in some[2:]]
            work_off(runner)
        for handle, expected in zip(handles, alone, strict=True):
            assert handle.completions[0].tokens == expected.tokens
            ours, theirs = ([d.p_after for d in c.draws] for c in (handle.completions[0], expected))
            np.testing.assert_allclose(ours, theirs, atol=2e-3)
    finally:
        backend.close()


@pytest.mark.parametrize("shared", [True, False])
def test_a_chat_of_five_turns_beside_another(smollm2: GGUFModel, shared: bool) -> None:
    """No turn reads more than its new tokens, whether the turns alternate or run side by side."""
    backend = LlamaCppBackend(smollm2, LoadOptions(context=768, sequences=4, shared=shared, threads=1))
    turn = Turn(Plan(SamplingParams(temperature=0), max_tokens=8))
    try:
        for side_by_side in (False, True):
            runner = Scheduler(backend, 2)
            sessions = [ChatSession(backend, runner) for _ in range(2)]
            held: list[int | None] = [None, None]
            for number in range(5):
                running = [
                    session.ask(f"Question {number} to you, {name}?", turn, lambda: False)
                    for session, name in zip(sessions, ("Ada", "Max"), strict=True)
                ]
                if not side_by_side:
                    for each in running:
                        list(each)
                while running:
                    running = [each for each in running if next(each, None) is not None]
                for i, session in enumerate(sessions):
                    timings, answer = session.timings, session.last
                    assert answer is not None
                    assert held[i] is None or timings.cached_tokens == held[i]
                    said = answer.completion
                    # as text, the answer may give other tokens; then the next turn parts from it earlier
                    same = backend.encode(said.text, add_special=False, parse_special=False) == said.tokens
                    assert same, said.text
                    held[i] = timings.prompt_tokens + timings.generated_tokens - 1
            runner.close()
    finally:
        backend.close()


def test_what_is_found_says_the_same_as_what_is_read(eight: LlamaCppBackend) -> None:
    """Tests a prompt that continues a kept answer, and one that shares its beginning with a running job."""
    first, second = jobs([60, 20], [20, 12])

    def answers(runner: Scheduler) -> list[Handle]:
        one = runner.submit(first)
        work_off(runner)
        further = Job([*first.prompt, *one.completions[0].tokens, 7, 8], second.requests)
        beside = Job([*first.prompt[:50], *second.prompt], second.requests)
        handles = [runner.submit(further), runner.submit(beside)]
        work_off(runner)
        return handles

    with Scheduler(eight, 2) as runner:
        found = answers(runner)
    assert found[0].timings.cached_tokens == 79
    assert found[1].timings.cached_tokens == 50
    for handle in found:
        with Scheduler(eight, 2) as runner:
            fresh = runner.submit(handle.job)
            work_off(runner)
        assert fresh.timings.cached_tokens == 0
        assert fresh.completions[0].tokens == handle.completions[0].tokens
