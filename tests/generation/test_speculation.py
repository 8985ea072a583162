"""Guessed tokens change no text: each draw is the one without guesses, whoever guesses."""

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emlocal.backends.base import Feed
from emlocal.backends.fake import CHAT_TEMPLATE, END, FakeBackend, hashed, saying
from emlocal.em.steps import AdaptiveTemperature, EMInf
from emlocal.generation import Completion, Handle, Job, Request, Scheduler, Token
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.generation.speculation import Guess, Guesser, Lookup, Pace, Speculation, speculation_of
from emlocal.generation.thinking import Reasoning
from emlocal.sampling import SamplingParams, Uniforms
from emlocal.settings.constraint import Constraint

WILD = SamplingParams(temperature=1.0, min_p=0.0)
STEPS = {
    "off": None,
    "default": EMInf(),
    "em-pt": EMInf(optimizer="adam", learning_rate=0.1, steps=3, threshold=0.3),
    "adaptive": AdaptiveTemperature(),
}


def looping(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Returns logits after which an answer repeats itself often: they depend on the last three tokens."""
    row = hashed([*tokens][-3:])
    row[:224], row[250:END] = -20, -20
    row[END] -= 4
    return row * 1.5


class Told:
    """Guesses from the answers that are known, changed by `change`."""

    def __init__(
        self, answers: Sequence[Sequence[int]], change: Callable[[Sequence[int]], Sequence[int]]
    ) -> None:
        self._answers, self._change = answers, change
        self._read = [0] * len(answers)

    def read(self, sample: int, answer: Sequence[int]) -> None:
        assert list(answer) == list(self._answers[sample][: len(answer)])
        self._read[sample] = len(answer)

    def guess(self, sample: int, most: int) -> Guess:
        start = self._read[sample]
        return Guess(self._change(self._answers[sample][start : start + min(most, 6)]), 1)


def wrong(tokens: Sequence[int]) -> list[int]:
    return [(token + 1) % END for token in tokens]


def mixed(tokens: Sequence[int]) -> list[int]:
    random = Random(len(tokens) + sum(tokens))
    return [token if random.random() < 0.7 else random.randrange(END) for token in tokens]


def engine(script: Callable = looping, sequences: int = 8 + SPARE_SEQUENCES, **options: Any) -> FakeBackend:
    return FakeBackend(script, sequences=sequences, **{"shared": False, "context": 512, **options})


def run(
    jobs: Sequence[Job],
    speculation: Speculation | None,
    backend: FakeBackend | None = None,
    parallel: int = 8,
) -> list[Handle]:
    with Scheduler(backend or engine(), parallel, speculation) as runner:
        handles = [runner.submit(job) for job in jobs]
        while not runner.idle:
            runner.step()
    return handles


def said(handles: Sequence[Handle]) -> list[list[Completion]]:
    """Returns the completions, which compare by all that they have: draws, texts, ends, reasons."""
    return [handle.result() for handle in handles]


def guessers(expected: Sequence[Handle]) -> dict[str, Callable[[Job], Guesser]]:
    known = {
        handle.job: [[draw.token for draw in completion.draws] for completion in handle.completions]
        for handle in expected
    }
    changes: dict[str, Callable] = {"right": list, "wrong": wrong, "mixed": mixed}
    told = {
        name: partial(lambda change, job: Told(known[job], change), change)
        for name, change in changes.items()
    }
    return {**told, "lookup": Lookup}


def same(jobs: Sequence[Job], parallel: int = 8, **options: Any) -> dict[str, Speculation]:
    """Asserts that no guesser changes an answer, and returns what each did."""
    expected = run(jobs, None, engine(**options), parallel)
    done = {}
    for name, guesser in guessers(expected).items():
        for pace in (None, Pace()) if name == "mixed" else (None,):
            speculation = Speculation(guesser, pace)
            found = run(jobs, speculation, engine(**options), parallel)
            assert said(found) == said(expected), name
            if pace is None:
                done[name] = speculation
    return done


def prompts(n: int) -> list[list[int]]:
    random = Random(5)
    return [[random.randrange(224, 250) for _ in range(random.randrange(1, 60))] for _ in range(n)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("step", STEPS)
def test_texts_are_those_without_guesses(step: str, temperature: float) -> None:
    params = SamplingParams(em=STEPS[step], temperature=temperature)
    jobs = [Job(p, [Request(params, Uniforms(1, i), 4 + i % 23)]) for i, p in enumerate(prompts(100))]
    done = same(jobs)
    assert done["right"].right == done["right"].fed > 500
    assert done["wrong"].right == 0 < done["wrong"].fed
    assert 0 < done["mixed"].right < done["mixed"].fed
    assert done["lookup"].right > 0


def test_right_guesses_save_passes() -> None:
    jobs = [Job(p, [Request(WILD, Uniforms(1, i), 70)]) for i, p in enumerate(prompts(3))]
    expected = run(jobs, None)
    found = run(jobs, Speculation(guessers(expected)["right"]))
    for plain, quick in zip(expected, found, strict=True):
        assert quick.forward_passes <= plain.forward_passes / 6 + 2
        assert quick.timings.generated_tokens == plain.timings.generated_tokens


OPTIONS: dict[str, dict[str, Any]] = {
    "penalties": {"params": SamplingParams(temperature=1.0, repeat_penalty=1.4, frequency_penalty=0.5)},
    "alternatives": {"top": 3},
    "number": {"constraint": Constraint("regex", r"[0-9]{3}(-[0-9]{3})*x")},
    "json": {"constraint": Constraint("json_schema", '{"type": "array", "items": {"enum": ["ab", "ac"]}}')},
    "pause": {"pause": lambda text, tokens: tokens >= 7},
    "one token": {"max_tokens": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("samples", [1, 4])
def test_requests_of_all_kinds(name: str, samples: int) -> None:
    given = {"params": WILD, "max_tokens": 30, **OPTIONS[name]}
    jobs = [
        Job(p, [Request(uniforms=Uniforms(2, i, s), **given) for s in range(samples)])
        for i, p in enumerate(prompts(12))
    ]
    for parallel in (3, 8):
        same(jobs, parallel)


def test_stop_strings_within_a_guess() -> None:
    reply = "one two three STOP four five six seven"
    stops = [(), ("STOP",), ("three STOP",), ("e", "STOP"), ("x",)]
    jobs = [
        Job(list(b"[user]count\n[assistant]"), [Request(WILD, Uniforms(3, i), 60, stop)])
        for i, stop in enumerate(stops)
    ]
    same(jobs, script=saying(reply, sharpness=60))


def test_the_end_of_the_context() -> None:
    params = SamplingParams(temperature=1.0, min_p=0.0, logit_bias=((END, -float("inf")),))
    jobs = [Job(p[:9], [Request(params, Uniforms(4, i), 500)]) for i, p in enumerate(prompts(6))]
    same(jobs, context=40)
    assert run(jobs, None, engine(context=40))[0].completions[0].finish_reason == "context"


def test_guesses_take_nobodys_room() -> None:
    """The sequences share 220 cells: without guesses the answers just fit."""
    params = SamplingParams(temperature=1.0, min_p=0.0, logit_bias=((END, -float("inf")),))
    jobs = [Job(p[:5] or [230], [Request(params, Uniforms(5, i), 45)]) for i, p in enumerate(prompts(4))]
    same(jobs, 4, shared=True, context=204)


def test_forced_tokens_of_thoughts() -> None:
    jobs = [
        Job(
            list(b"[user]what?\n[assistant]"),
            [Request(WILD, Uniforms(6, 0, 0), 80, reasoning=Reasoning(budget))],
        )
        for budget in (None, 0, 3, 7)
    ]
    reply = "<think>\nIt may be 3, or 4.\n</think>\n\nFour."
    same(jobs, script=saying(reply, sharpness=60), chat_template=CHAT_TEMPLATE + "{# </think> #}")


def test_cancelled_among_others() -> None:
    jobs = [Job(p, [Request(WILD, Uniforms(7, i), 40)]) for i, p in enumerate(prompts(6))]
    expected = run(jobs, None)
    runner = Scheduler(engine(), 8, Speculation(guessers(expected)["mixed"]))
    handles = [runner.submit(job) for job in jobs]
    for _ in range(3):
        runner.step()
    runner.cancel(handles[2])
    while not runner.idle:
        runner.step()
    stopped = handles[2].completions[0]
    assert stopped.draws == expected[2].completions[0].draws[: len(stopped.draws)]
    del handles[2], expected[2]
    assert said(handles) == said(expected)
    runner.close()


def test_kept_sequences_hold_no_guesses() -> None:
    """Later prompts go on from what an answer left; a wrong guess left there would change them."""
    first = [Job(p, [Request(WILD, Uniforms(8, i), 25)]) for i, p in enumerate(prompts(8))]
    expected = run(first, None, engine(hashed))
    more = [
        Job([*h.job.prompt, *h.completions[0].tokens, 230, 231], [Request(WILD, Uniforms(9, i), 25)])
        for i, h in enumerate(expected)
    ]
    plain = run(more, None, engine(hashed))
    for name, guesser in guessers([*expected, *plain]).items():
        backend = engine(hashed, sequences=20)
        runner = Scheduler(backend, 8, Speculation(guesser))
        for jobs, answers in ((first, expected), (more, plain)):
            handles = [runner.submit(job) for job in jobs]
            while not runner.idle:
                runner.step()
            assert said(handles) == said(answers), name
        runner.close()


def test_an_engine_that_cannot_go_back_runs_without() -> None:
    class Watched(FakeBackend):
        def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
            assert all(feed.wanted <= 1 for feed in feeds)
            super().forward(feeds, cancelled)

    jobs = [Job(p, [Request(WILD, Uniforms(1, i), 20)]) for i, p in enumerate(prompts(4))]
    backend = Watched(looping, sequences=10, shared=False, trims=False)
    assert said(run(jobs, Speculation(), backend)) == said(run(jobs, None))


def test_events_come_one_by_one() -> None:
    job = Job(prompts(1)[0], [Request(WILD, Uniforms(1, 0), 30)])
    texts = []
    for speculation in (None, Speculation(guessers(run([job], None))["right"])):
        with Scheduler(engine(), 1, speculation) as runner:
            texts.append([(e.draw, e.text) for e in runner.follow([job]) if isinstance(e, Token)])
    assert texts[0] == texts[1]


# ------------------------------------------------------------------------------------------- guessers


def guess(prompt: str, answer: str, most: int = 8, other: str = "") -> tuple[str, int]:
    lookup = Lookup(Job(list(prompt.encode()), [Request(WILD, Uniforms(0), 1)]))
    lookup.read(1, list(other.encode()))
    for end in range(len(answer) + 1):
        lookup.read(0, list(answer[:end].encode()))
    tokens, strength = lookup.guess(0, most)
    return bytes(tokens).decode(), strength


def test_lookup_takes_the_longest_match() -> None:
    assert guess("abXcd abYef zabX", "q zab") == ("X", 4)
    assert guess("the cat sat. The dog", "a cat s", 4) == ("at. ", 6)
    assert guess("12 one, 12 two, ", "12", 4) == (" two", 4)  # of equally long ones, the later one
    assert guess("abc", "xyz") == ("", 0)
    assert guess("", "") == ("", 0)


def test_lookup_reads_the_other_samples() -> None:
    assert guess("?", "so the an", 6, other="thus the answer is 3") == ("swer i", 7)


def test_lookup_goes_round_in_a_text_that_repeats_itself() -> None:
    assert guess("", "abcabcab", 8)[0] == "cabcabca"


# ----------------------------------------------------------------------------------------------- pace


@cache
def ruled(slope: float, chance: float, passes: int = 2000) -> tuple[float, float]:
    """Returns tokens a second with `Pace` and without, where row k of a pass costs `slope` passes."""
    random, pace, clock, tokens = Random(1), Pace(), 0.0, 0
    for _ in range(passes):
        length = pace.lengths([Guess([1] * 8, 3)])[0]
        right = next((i for i in range(8) if random.random() >= chance), 8)
        drawn = min(right, length) + 1
        for i in range(min(length + 1, 8, right + 1)):
            pace.tested(3, i < right)
        seconds = 1 + slope * length
        pace.passed(seconds, 1, 1 + length, drawn)
        clock, tokens = clock + seconds, tokens + drawn
    return tokens / clock, 1.0


@pytest.mark.parametrize(
    ("slope", "chance"), [*itertools.product([0.02, 0.1, 0.4, 0.9], [0.0, 0.2, 0.5, 0.8, 0.95])]
)
def test_pace_never_loses_two_percent(slope: float, chance: float) -> None:
    quick, plain = ruled(slope, chance)
    assert quick >= 0.98 * plain
    best = max(sum(chance**i for i in range(k + 1)) / (1 + slope * k) for k in range(9))
    assert quick >= 0.9 * best


def test_pace_begins_without_guesses() -> None:
    pace = Pace()
    assert pace.lengths([Guess([1, 2], 8)]) == [0]
    for _ in range(40):
        pace.tested(8, True)
    assert pace.lengths([Guess([1, 2], 8)]) == [0]
    for _ in range(3):
        pace.passed(1.0, 1, 1, 1)
    assert pace.lengths([Guess([1, 2], 8)]) == [2]
    assert pace.lengths([Guess()]) == [0]


def test_pace_stops_where_passes_are_dearer_than_they_seemed() -> None:
    pace = Pace()
    for _ in range(40):
        pace.tested(8, True)
        pace.passed(1.0, 1, 1, 1)
    spent = [pace.lengths([Guess([1] * 4, 8)])[0]]
    for _ in range(30):
        length = pace.lengths([Guess([1] * 4, 8)])[0]
        spent.append(length)
        pace.passed(1.0 if length == 0 else 9.0, 1, 1 + length, 1 + length)
    assert spent[0] == 4
    assert spent[-1] == 0
    assert sum(length > 0 for length in spent) <= 3


def test_an_engine_that_cannot_go_back_is_said_once() -> None:
    said: list[str] = []
    assert speculation_of("auto", engine(trims=False), said.append) is None
    assert said == ["fake on fake cannot go back from a guessed token; --speculate is off"]
    assert speculation_of("off", engine(), said.append) is None
    lookup = speculation_of("lookup", engine(), said.append)
    assert isinstance(lookup, Speculation)
    assert len(said) == 1
