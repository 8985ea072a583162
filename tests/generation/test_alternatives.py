"""The tokens that could have been drawn instead, against the definition."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from emlocal.backends.fake import VOCABULARY, FakeBackend, hashed
from emlocal.em.steps.em_inf import EMInf
from emlocal.errors import LogitsError
from emlocal.generation import Completed, Finished, Job, Request, Scheduler, Token
from emlocal.generation.alternatives import alternatives
from emlocal.sampling import SamplingParams, Uniforms

ROW: NDArray[np.float32] = hashed([1, 2, 3])


def log_softmax(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(z - np.log(np.exp(z - z.max()).sum()) - z.max())


def test_they_are_the_most_probable_before_and_after_em() -> None:
    step = EMInf()
    params = SamplingParams(em=step, frequency_penalty=1.0, logit_bias=((5, 3.0),))
    seen = [7, 7, 9]
    z = ROW.astype(np.float64)
    z[7] -= 2.0
    z[9] -= 1.0
    z[5] += 3.0
    found = alternatives(ROW, params, seen, 10)
    before, after = log_softmax(z), log_softmax(step.reference(z).logits)
    assert [each.token for each in found] == [*np.argsort(-before)[:10]]
    for each in found:
        assert each.log_p_before == pytest.approx(before[each.token], abs=1e-5)
        assert each.log_p_after == pytest.approx(after[each.token], abs=1e-3)


def test_illegal_tokens_are_not_among_them() -> None:
    mask = np.zeros((VOCABULARY + 7) // 8, dtype=np.uint8)
    for token in (10, 20, 30):
        mask[token // 8] |= 1 << token % 8
    found = alternatives(ROW, SamplingParams(), (), 5, mask)
    assert {each.token for each in found[:3]} == {10, 20, 30}
    assert sum(np.exp(each.log_p_before) for each in found[:3]) == pytest.approx(1)
    assert all(each.log_p_before == -np.inf for each in found[3:])


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
def test_each_draw_of_a_request_that_asks_has_them(at_once: bool, samples: int) -> None:
    backend = FakeBackend(sequences=8)
    requests = [Request(SamplingParams(), Uniforms(1, 0, i), 6, top=3) for i in range(samples)]
    with Scheduler(backend, 4) as runner:
        events = [*runner.follow([Job([1, 2, 3], requests, at_once)])]
    for event in events:
        if isinstance(event, Token):
            assert len(event.alternatives) == 3
        elif isinstance(event, Completed):
            done = event.completion
            assert len(done.alternatives) == len(done.draws)
            for i, (draw, noted) in enumerate(zip(done.draws, done.alternatives, strict=True)):
                row = hashed([1, 2, 3, *done.tokens[:i]])
                assert [each.token for each in noted] == [*np.argsort(-row)[:3]]
                for each in noted:
                    if each.token == draw.token:
                        assert np.exp(each.log_p_before) == pytest.approx(draw.p_before, rel=1e-4)


def test_nobody_pays_who_does_not_ask() -> None:
    with Scheduler(FakeBackend(sequences=8), 2) as runner:
        for event in runner.follow([Job([1], [Request(SamplingParams(), Uniforms(1), 4)])]):
            if isinstance(event, Completed):
                assert event.completion.alternatives == []


@pytest.mark.parametrize("em", [None, EMInf()])
def test_a_row_that_is_no_distribution_fails_alone(em: EMInf | None) -> None:
    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        row = hashed(tokens)
        return np.full_like(row, np.nan) if tokens[0] == 9 else row

    params = SamplingParams(em=em)
    jobs = [Job([first, 2, 3], [Request(params, Uniforms(1, 0, 0), 4, top=3)]) for first in (1, 9)]
    with Scheduler(FakeBackend(script, sequences=8), 4) as runner:
        done = [event.handle for event in runner.follow(jobs) if isinstance(event, Finished)]
    good, bad = sorted(done, key=lambda handle: handle.job.prompt[0])
    assert len(good.result()[0].draws) == len(good.result()[0].alternatives) == 4
    with pytest.raises(LogitsError):
        bad.result()
