"""With fixed shapes an answer is the same to the bit, alone and among others, on real llama.cpp."""

import random
from collections.abc import Iterator

import pytest

from emlocal.backends.base import Backend, Feed, LoadOptions
from emlocal.backends.fake import FakeBackend
from emlocal.backends.fixed_shapes import PART, FixedShapes, fixed_shapes
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.errors import CancelledError, ContextFullError, UsageError
from emlocal.generation import Job, Request, Scheduler, Token
from emlocal.sampling import Draw, Uniforms
from emlocal.settings import EMInf, SamplingParams

PARALLEL = 5


@pytest.fixture(params=["tiny_model", "smollm2"])
def engine(request: pytest.FixtureRequest) -> Iterator[FixedShapes]:
    model = request.getfixturevalue(request.param)
    options = LoadOptions(context=256, sequences=PARALLEL + 4, shared=False, threads=2)
    opened = fixed_shapes(LlamaCppBackend(model, options))
    yield opened
    opened.close()


def jobs(count: int) -> list[Job]:
    """Prompts of 1 to 200 tokens, most with one of two beginnings; one in four has three samples."""
    chance = random.Random(7)
    beginnings = [[chance.randrange(3, 250) for _ in range(150)] for _ in range(2)]
    found = []
    for i in range(count):
        begun = chance.choice(beginnings)[: chance.choice([0, 30, 64, 65, 128, 150])]
        prompt = [*begun, *(chance.randrange(3, 250) for _ in range(chance.randrange(1, 50)))]
        params = SamplingParams(temperature=0.9, em=EMInf() if i % 3 == 0 else None)
        requests = [Request(params, Uniforms(5, i, k), 12) for k in range(3 if i % 4 == 0 else 1)]
        found.append(Job(prompt, requests, session=f"client {i % 3}"))
    return found


def draws(engine: Backend, asked: list[Job], neighbours: bool = False) -> list[dict[int, list[Draw]]]:
    """The draws of each sample of each job; with `neighbours`, jobs run beside them and are cancelled."""
    found: list[dict[int, list[Draw]]] = [{} for _ in asked]
    with Scheduler(engine, PARALLEL) as runner:
        numbers, waiting = {}, [*enumerate(asked)]
        step = 0
        while waiting or not runner.idle:
            while waiting and runner.free > 0:
                number, job = waiting.pop(0)
                numbers[runner.submit(job)] = number
            step += 1
            other = None
            if neighbours and step % 4 == 0:
                other = runner.submit(Job([9, *range(20, 90), step % 200], asked[0].requests[:1]))
            for event in runner.step():
                if isinstance(event, Token) and event.handle in numbers:
                    found[numbers[event.handle]].setdefault(event.sample, []).append(event.draw)
            if other is not None:
                runner.cancel(other)
    return found


def test_alone_and_among_others(engine: FixedShapes) -> None:
    asked = jobs(16)
    alone = [draws(engine, [job])[0] for job in asked]
    assert all(each and all(each.values()) for each in alone)
    assert draws(engine, asked) == alone
    assert draws(engine, asked[::-1], neighbours=True) == alone[::-1]


def test_a_conversation_that_goes_on_is_as_if_it_were_new(engine: FixedShapes) -> None:
    """What a turn computed step by step is computed again as a prompt."""
    [first] = draws(engine, [jobs(2)[1]])
    prompt = [*jobs(2)[1].prompt, *(draw.token for draw in first[0]), *range(40, 70)]
    next_turn = Job(prompt, jobs(2)[1].requests, session="client 1")
    together = draws(engine, [jobs(2)[1], next_turn])
    assert together[1] == draws(engine, [next_turn])[0]


def test_lengths_and_cuts() -> None:
    fake = FakeBackend(shared=False)
    fixed = FixedShapes(fake)
    sequence = fixed.open()
    fixed.forward([Feed(sequence, range(100), wanted=False)])
    assert (fixed.length(sequence), fake.length(sequence)) == (100, PART)
    copy = fixed.fork(sequence)
    assert fixed.trim(sequence, 90) == 90  # what waits can be cut anywhere
    fixed.forward([Feed(sequence, [7])])
    assert (fixed.length(sequence), fake.length(sequence)) == (91, 91)
    assert (fixed.logits(sequence) == fake.row([*range(90), 7])).all()
    assert fixed.trim(sequence, 91) == PART  # the last part was shorter
    assert fixed.trim(sequence, 10) == 0
    assert fixed.length(copy) == 100
    fixed.forward([Feed(copy, range(100, 2 * PART))])
    assert fixed.trim(copy, 2 * PART) == 2 * PART
    for each in (sequence, copy):
        fixed.release(each)
    assert not fake._held


def test_a_failed_pass_changes_nothing() -> None:
    fake = FakeBackend(shared=False, context=200)
    fixed = FixedShapes(fake)
    one, two = fixed.open(), fixed.open()
    fixed.forward([Feed(one, range(100), wanted=False), Feed(two, [1, 2])])
    with pytest.raises(ContextFullError):
        fixed.forward([Feed(two, [3]), Feed(one, range(101), wanted=False)])
    passes = iter([False, True])
    with pytest.raises(CancelledError):
        fixed.forward([Feed(one, range(30), wanted=False), Feed(two, [3])], lambda: next(passes))
    assert (fixed.length(one), fixed.length(two)) == (100, 2)


def test_other_engines_are_refused() -> None:
    with pytest.raises(UsageError, match="not tested with fake"):
        fixed_shapes(FakeBackend())
