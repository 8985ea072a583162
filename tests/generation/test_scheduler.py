"""Continuous batching: answers ignore their neighbours, no prompt is read twice, nothing is left behind."""

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from emlocal.backends.fake import END, FakeBackend, hashed
from emlocal.em.steps import EMInf
from emlocal.errors import CancelledError, ContextFullError, LogitsError, UsageError
from emlocal.generation import Finished, Handle, Job, Request, Scheduler
from emlocal.generation.scheduler import PROMPT_TOKENS_PER_STEP, SPARE_SEQUENCES
from emlocal.sampling import SamplingParams, Uniforms

EM = SamplingParams(em=EMInf(), temperature=1.0, min_p=0.02)


def backend(parallel: int, script: Callable = hashed, **options) -> FakeBackend:
    return FakeBackend(
        script, sequences=parallel + SPARE_SEQUENCES, shared=False, **{"context": 2048, **options}
    )


def job(tag: int, text: str, samples: int = 1, max_tokens: int | None = None, params=EM) -> Job:
    most = max_tokens or 5 + tag * 7 % 40
    requests = [Request(params, Uniforms(3, tag, s), most, ("zq",)) for s in range(samples)]
    return Job(list(text.encode()), requests)


def source(jobs: Sequence[Job]) -> Callable[[], Job | None]:
    waiting = deque(jobs)
    return lambda: waiting.popleft() if waiting else None


def finished(runner: Scheduler, jobs: Sequence[Job]) -> list[Handle]:
    """Returns the handles in the order in which the jobs end."""
    return [e.handle for e in runner.run(source(jobs)) if isinstance(e, Finished)]


def run(engine: FakeBackend, jobs: Sequence[Job], parallel: int) -> list[Handle]:
    """Returns the handles in the order of the jobs."""
    with Scheduler(engine, parallel) as runner:
        found = {handle.job: handle for handle in finished(runner, jobs)}
        assert runner.idle
    assert engine.open() == 0  # every sequence is free again
    return [found[job] for job in jobs]


def said(handles: Sequence[Handle]) -> list[list[tuple]]:
    return [
        [(c.sample, c.text, c.tokens, c.finish_reason, c.draws) for c in handle.result()]
        for handle in handles
    ]


JOBS = [job(i, f"prompt {i} " + "x" * (i * 37 % 500), 1 + i % 4) for i in range(40)]


def test_answers_do_not_depend_on_the_batch() -> None:
    alone = [said(run(backend(4), [one], 4))[0] for one in JOBS]
    for parallel in (1, 3, 16):
        assert said(run(backend(parallel), JOBS, parallel)) == alone


@pytest.mark.parametrize("trims", [True, False])
def test_engines_that_cannot_trim_say_the_same(trims: bool) -> None:
    jobs = [job(i, "the same beginning of forty characters or so " + str(i), 2) for i in range(9)]
    assert said(run(backend(4, trims=trims), jobs, 4)) == said(run(backend(4), jobs, 4))


def test_samples_share_the_reading_of_their_prompt() -> None:
    engine, prompt = backend(4), "y" * 600
    done = run(engine, [job(0, prompt, 8, 10)], 4)[0]
    generated = sum(len(c.draws) for c in done.completions)
    assert len(done.completions) == 8
    assert engine.fed == 599 + generated  # the last token of the prompt is each sample's first step
    assert done.forward_passes == math.ceil(599 / PROMPT_TOKENS_PER_STEP) + generated


def test_a_common_beginning_is_read_once() -> None:
    engine, few_shot = backend(4), "worked examples " * 30
    jobs = [job(i, few_shot + f"question {i}") for i in range(20)]
    done = run(engine, jobs, 4)
    own = sum(len(j.prompt) - 1 - len(few_shot) for j in jobs)
    generated = sum(len(c.draws) for d in done for c in d.completions)
    assert len(few_shot) + own + generated - 200 <= engine.fed <= len(few_shot) + own + generated
    assert all(d.timings.cached_tokens >= len(few_shot) for d in done)


def test_a_beginning_found_late_is_taken_from_who_has_it() -> None:
    """With one place, the second prompt arrives when the first is done; the third finds the root."""
    engine, shared = backend(1), "s" * 300
    done = run(engine, [job(i, shared + str(i)) for i in range(5)], 1)
    assert [handle.timings.cached_tokens for handle in done] == [0, 300, 300, 300, 300]
    generated = sum(len(c.draws) for d in done for c in d.completions)
    assert engine.fed == 2 * 300 + generated


def test_a_free_place_is_filled_in_the_next_step() -> None:
    runner = Scheduler(backend(4), 4)
    jobs = [job(i, f"{i}", 1, most) for i, most in enumerate([3, 50, 50, 50, 50])]
    assert finished(runner, jobs)[0].job is jobs[0]
    longest = max(len(c.draws) for f in run(backend(4), jobs, 4) for c in f.completions)
    assert runner.counters.steps <= 3 + longest + 1


def test_jobs_may_follow_from_others() -> None:
    waiting = deque([job(0, "first")])
    prompts = []
    for event in Scheduler(backend(2), 2).run(lambda: waiting.popleft() if waiting else None):
        if isinstance(event, Finished):
            prompts.append(bytes(event.handle.job.prompt).decode())
            if len(prompts) < 6:
                waiting.append(job(len(prompts), f"{len(prompts)}"))
    assert prompts == ["first", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (job(1, "x" * 300), ContextFullError, "300 tokens"),
        (job(1, "x" * 256), ContextFullError, "holds 256"),
        (job(2, ""), UsageError, "empty"),
        (job(3, "fine", 0), UsageError, "number of samples"),
    ],
)
def test_what_cannot_be_done_never_enters(bad: Job, error: type[Exception], message: str) -> None:
    runner = Scheduler(backend(2, context=256), 2)
    handle = runner.submit(job(0, "fine"))
    for way in (runner.submit, lambda bad: next(runner.follow([bad])), lambda bad: finished(runner, [bad])):
        with pytest.raises(error, match=message):
            way(bad)
    while not runner.idle:
        runner.step()
    assert handle.result()[0].text


def test_a_row_that_is_no_distribution_fails_alone() -> None:
    def script(tokens: Sequence[int]) -> np.ndarray:
        row = hashed(tokens)
        row[END] = -50
        if bytes(t for t in tokens if t < END).startswith(b"bad") and len(tokens) > 6:
            row[7] = math.nan
        return row

    done = run(backend(3, script), [job(0, "good"), job(1, "bad", 2), job(2, "good")], 3)
    assert isinstance(done[1].error, LogitsError)
    assert not done[1].completions
    with pytest.raises(LogitsError):
        done[1].result()
    assert done[0].error is done[2].error is None


def test_the_context_ends_an_answer() -> None:
    def script(tokens: Sequence[int]) -> np.ndarray:
        row = np.zeros(END + 1, dtype=np.float32)
        row[97] = 50
        return row

    done = run(backend(2, script, context=64), [job(0, "x" * 60, 1, 100), job(1, "x", 1, 10)], 2)
    assert done[0].completions[0].finish_reason == "context"
    assert len(done[0].completions[0].tokens) == 5  # 60 to 64 held, and the one that needs no room
    assert done[1].completions[0].finish_reason == "length"


def test_stopping_leaves_nothing_behind() -> None:
    engine, steps = backend(4), 0

    def cancelled() -> bool:
        nonlocal steps
        steps += 1
        return steps > 20

    runner = Scheduler(engine, 4)
    with pytest.raises(CancelledError):
        list(runner.run(source(JOBS), cancelled))
    assert runner.idle
    runner.close()
    assert engine.open() == 0


def test_jobs_are_taken_as_they_are_needed() -> None:
    taken = ended = 0

    def endless() -> Job:
        nonlocal taken
        taken += 1
        return job(taken, f"prompt {taken}")

    running = Scheduler(backend(4), 4).run(endless)
    for event in running:
        ended += isinstance(event, Finished)
        assert taken <= ended + 4
        if ended == 50:
            break
    running.close()


def test_too_many_places_for_the_backend() -> None:
    with pytest.raises(UsageError, match="sequences"):
        Scheduler(backend(4), 6)


def test_what_is_decoded_together_has_numbers_that_follow_in_order() -> None:
    """llama.cpp computes sequences in one pass only if their numbers are consecutive.

    Gaps that stay empty are closed.
    """
    together: list[list[int]] = []

    class Watched(FakeBackend):
        def forward(self, feeds, cancelled=lambda: False) -> None:
            together.append(sorted(feed.sequence for feed in feeds))
            super().forward(feeds, cancelled)

    engine = Watched(sequences=8 + SPARE_SEQUENCES, shared=False)
    run(engine, [job(i, f"{i}", 1, 3 + i * 11 % 37) for i in range(30)], 8)
    gaps = sum(ids[-1] - ids[0] + 1 != len(ids) for ids in together if ids)
    assert gaps == 0
    assert len(together[-5]) == 1  # and so on to the end
