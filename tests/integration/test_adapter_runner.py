"""Requests for several adapters of one loaded model: each answer is that of its adapter alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from emlocal.backends.base import LoadOptions
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.generation import Finished, Handle, Job, Request, Runner, Scheduler
from emlocal.generation.adapters import AdapterRunner, runner_of
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.gguf import read_header
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.sampling import Uniforms
from emlocal.settings import SamplingParams
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_pair import random_adapter

NAMES = ("", "first", "second")
PARALLEL = 3
OPTIONS = LoadOptions(context=96, sequences=PARALLEL + 4, shared=False, threads=1)


@pytest.fixture
def model(tmp_path: Path) -> GGUFModel:
    found = resolve(str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    assert isinstance(found, GGUFModel)
    return found


@pytest.fixture
def files(model: GGUFModel, tmp_path: Path) -> dict[str, Path]:
    made = {name: tmp_path / f"{name}.gguf" for name in NAMES[1:]}
    for seed, path in enumerate(made.values(), 1):
        write_gguf(random_adapter(layers=1, seed=seed), path, read_header(model.path))
    return made


@pytest.fixture
def backend(model: GGUFModel) -> Iterator[LlamaCppBackend]:
    opened = LlamaCppBackend(model, OPTIONS)
    yield opened
    opened.close()


def job(number: int, adapter: str, samples: int = 1) -> Job:
    prompt = [1, *range(40, 60), 70 + number % 3, 45, 200]
    params = SamplingParams(temperature=0.7)
    requests = [Request(params, Uniforms(5, number, i), 8) for i in range(samples)]
    return Job(prompt, requests, adapter=adapter)


def answers(runner: Runner, jobs: list[Job]) -> list[list[list[int]]]:
    """The tokens of each job's samples; a job is submitted when there is a place."""
    waiting, handles = [*jobs], list[Handle]()
    while waiting or not runner.idle:
        while waiting and runner.free > 0:
            handles.append(runner.submit(waiting.pop(0)))
        runner.step()
    return [[[*each.tokens] for each in handle.result()] for handle in handles]


def test_each_answer_is_that_of_its_adapter_alone(
    model: GGUFModel, files: dict[str, Path], backend: LlamaCppBackend
) -> None:
    jobs = [job(n, NAMES[n % 3], samples=5 if n == 4 else 1) for n in range(12)]
    wanted: dict[int, list[list[int]]] = {}
    for name in NAMES:
        adapters = ((files[name], 1.0),) if name else ()
        alone = LlamaCppBackend(model, LoadOptions(96, 4, False, 1, adapters=adapters))
        for n, each in enumerate(jobs):
            if each.adapter == name:
                with Scheduler(alone, 1) as runner:
                    wanted[n] = answers(runner, [each])[0]
        alone.close()
    numbers = {name: backend.add_adapter(path, 1.0) for name, path in files.items()}
    with runner_of(backend, PARALLEL, numbers) as runner:
        found = answers(runner, jobs)
        assert answers(runner, jobs[::-1])[::-1] == found  # on kept sequences, in another order
    assert found == [wanted[n] for n in range(12)]
    assert len({str(each) for each in found}) > 6
    assert not backend._lengths


def test_adapters_take_turns_and_share_the_places(files: dict[str, Path], backend: LlamaCppBackend) -> None:
    numbers = {name: backend.add_adapter(path, 1.0) for name, path in files.items()}
    with AdapterRunner(backend, PARALLEL, numbers) as runner:
        handles = [runner.submit(job(n, name, samples=2)) for n, name in enumerate(("first", "second"))]
        assert runner.free == 0
        drawn = dict.fromkeys(handles, 0)
        most = 0
        while not runner.idle:
            for event in runner.step():
                if not isinstance(event, Finished):
                    drawn[event.handle] += 1
            most = max(most, sum(each.decoded for each in runner._schedulers.values()))
            assert abs(drawn[handles[0]] - drawn[handles[1]]) <= 12
        assert most == PARALLEL
        assert all(len(handle.result()) == 2 for handle in handles)


def test_a_cancelled_job_leaves_the_other_adapter_s_alone(
    files: dict[str, Path], backend: LlamaCppBackend
) -> None:
    numbers = {name: backend.add_adapter(path, 1.0) for name, path in files.items()}
    with AdapterRunner(backend, PARALLEL, numbers) as runner:
        alone = answers(runner, [job(1, "second")])
        first, second = runner.submit(job(0, "first")), runner.submit(job(1, "second"))
        for _ in range(4):
            runner.step()
        runner.cancel(first)
        while not runner.idle:
            runner.step()
        assert first.was_cancelled
        assert [[[*each.tokens] for each in second.result()]] == alone
    assert not backend._lengths
