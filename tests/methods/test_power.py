"""Power-SMC: the distribution of its answers, on a model small enough to list them all."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emlocal.backends.fake import END, VOCABULARY, FakeBackend, hashed
from emlocal.cancel import never
from emlocal.em.entropy import log_softmax
from emlocal.em.steps.power import Power as Raised
from emlocal.errors import CancelledError, ContextFullError, UsageError
from emlocal.generation import Scheduler
from emlocal.generation.prompt import Asked
from emlocal.methods import Chosen, Outcome
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.power import log_weight, normalized, systematic
from emlocal.sampling.sampler import Sampler
from emlocal.settings import EMInf, Plan, SamplingParams
from tests.batch.batches import row, rows, settings, timeless

Script = Callable[[Sequence[int]], NDArray[np.float32]]


def encode(asked: Asked) -> list[int]:
    assert isinstance(asked, str)
    return list(asked.encode())


def few(tokens: Sequence[int]) -> NDArray[np.float32]:
    """A trap: "a" is likelier than "b", but its continuations are scattered; after "b" all is certain."""
    said = bytes(t for t in tokens if t < END).decode().removeprefix("?")
    options = {
        "": {"a": 0.55, "b": 0.45},
        "a": dict.fromkeys("cdef", 0.2) | {"": 0.2},
        "b": {"c": 0.95, "": 0.05},
    }.get(said, {"g": 0.3, "h": 0.6, "": 0.1})
    found = np.full(VOCABULARY, -60, dtype=np.float32)
    for text, p in options.items():
        found[ord(text) if text else END] = math.log(p)
    return found


def silent(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Like `hashed`, but never ends."""
    return np.where(np.arange(VOCABULARY) == END, -60, hashed(tokens)).astype(np.float32)


@cache
def law(alpha: float, most: int) -> dict[str, float]:
    """Returns normalised p(answer)^α for all answers of at most `most` tokens, by listing them."""
    found: dict[str, float] = {}

    def walk(said: str, log_p: float, left: int) -> None:
        if left == 0:
            found[said] = log_p
            return
        log = log_softmax(few(list(b"?" + said.encode())).astype(np.float64))
        for token in np.flatnonzero(log > -30):
            if token == END:
                found[said + "."] = log_p + float(log[token])
            else:
                walk(said + chr(token), log_p + float(log[token]), left - 1)

    walk("", 0.0, most)
    powers = {text: math.exp(alpha * log_p) for text, log_p in found.items()}
    return {text: power / sum(powers.values()) for text, power in powers.items()}


def outcome(
    method: str,
    *,
    script: Script = few,
    key: int = 0,
    max_tokens: int = 3,
    cancelled: Callable[[], bool] = never,
    context: int = 512,
    asked: str = "?",
    runner: Scheduler | None = None,
) -> Outcome:
    how = Chosen(method)
    plan = how.plan(Plan(max_tokens=max_tokens))
    runner = runner or Scheduler(FakeBackend(script, sequences=40, shared=False, context=context), 32)
    *_, last = ask_one(runner, how.collecting, Question(asked, plan, encode, key), cancelled)
    assert isinstance(last, Answered)
    return last.asking.result()


def frequencies(method: str, runs: int) -> Counter[str]:
    found: Counter[str] = Counter()
    runner = Scheduler(FakeBackend(few, sequences=40, shared=False), 32)
    for key in range(runs):
        answer = outcome(method, key=key, runner=runner).completion
        found[answer.text + ("." if answer.finish_reason == "stop" else "")] += 1
    return found


def distance(found: Counter[str], expected: dict[str, float]) -> float:
    """Returns the total variation."""
    n = sum(found.values())
    return sum(abs(found[text] / n - expected.get(text, 0.0)) for text in {*found, *expected}) / 2


def test_the_model_is_a_trap_for_low_temperature() -> None:
    first = {text: sum(p for t, p in law(3.0, 3).items() if t.startswith(text)) for text in "ab"}
    assert first["b"] > 0.85
    assert 0.45**3 / (0.55**3 + 0.45**3) < 0.36  # the share at temperature 1/3


@pytest.mark.parametrize("block", [1, 2])
def test_with_many_particles_answers_have_the_powers_law(block: int) -> None:
    expected = law(3.0, 3)
    found = frequencies(f"power:16:power-alpha=3:power-block={block}", 250)
    assert distance(found, expected) < 0.1  # 250 draws from the exact distribution have 0.04 on average


def test_one_particle_is_low_temperature() -> None:
    found = frequencies("power:1:power-alpha=3:power-block=1", 250)
    assert distance(found, law(3.0, 3)) > 0.5
    assert sum(n for text, n in found.items() if text[0] == "b") / 250 == pytest.approx(0.354, abs=0.1)


def test_weights_are_the_sums_of_the_rows() -> None:
    """For the drawn tokens: log Σ p^α of each row, whatever the token."""
    for alpha in (1.0, 1.5, 2.0, 4.0):
        found = outcome(f"power:4:power-alpha={alpha}:power-block=100", script=hashed, max_tokens=40)
        for answer in found.completions:
            said, expected = list(b"?"), 0.0
            for draw in answer.draws:
                log = log_softmax(hashed(said).astype(np.float64))
                expected += math.log(float(np.exp(alpha * log).sum()))
                assert draw.p_before == pytest.approx(float(np.exp(log[draw.token])), rel=1e-5)
                said.append(draw.token)
            assert log_weight(answer.draws, alpha) == pytest.approx(expected, abs=1e-4 * len(answer.draws))


def test_alpha_1_samples_as_the_model_does() -> None:
    found = outcome("power:3:power-alpha=1:power-block=64", script=hashed, max_tokens=60)
    plain = Chosen("sample:1", samples=3)
    runner = Scheduler(FakeBackend(hashed, sequences=40, shared=False), 32)
    question = Question("?", plain.plan(Plan(max_tokens=60)), encode)
    *_, last = ask_one(runner, plain.collecting, question)
    assert isinstance(last, Answered)
    expected = last.asking.result().completions
    assert [c.tokens for c in found.completions] == [c.tokens for c in expected]
    assert found.fields == {"resampled": 0, "effective_particles": 3.0}


@pytest.mark.parametrize("alpha", [1.0, 1.7, 4.0])
def test_a_power_is_taken_on_real_rows_as_its_reference_has_it(
    recorded: NDArray[np.float32], alpha: float
) -> None:
    params = SamplingParams(em=Raised(alpha), temperature=1.0, min_p=0.0)
    sampler = Sampler(recorded.shape[1])
    for logits in recorded:
        log = log_softmax(logits.astype(np.float64))
        powers = np.exp(alpha * log)
        for u in (0.01, 0.3, 0.6, 0.99):
            draw = sampler.sample(logits, params, u)
            assert draw.p_before == pytest.approx(float(np.exp(log[draw.token])), rel=2e-5)
            assert draw.p_after == pytest.approx(float(powers[draw.token] / powers.sum()), rel=2e-5)
            below = float(powers[: draw.token].sum() / powers.sum())
            assert below - 1e-5 <= u <= below + draw.p_after + 1e-5
    if alpha > 1:
        assert sampler.paths[0] < len(recorded) * 4  # not all by the reference


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(any), st.floats(0, 1, exclude_max=True))
def test_systematic_resampling(raw: list[float], u: float) -> None:
    weights = [each / math.fsum(raw) for each in raw]
    n, chosen = len(weights), systematic(weights, u)
    assert len(chosen) == n
    assert chosen == sorted(chosen)
    for i, weight in enumerate(weights):
        assert math.floor(n * weight - 1e-9) <= chosen.count(i) <= math.ceil(n * weight + 1e-9)
        assert weight > 0 or i not in chosen


def test_resampling_has_the_right_means() -> None:
    weights = [0.5, 0.07, 0.2, 0.23]
    counts = sum((Counter(systematic(weights, u)) for u in np.arange(0.0005, 1, 0.001)), Counter())
    assert [counts[i] / 4000 for i in range(4)] == pytest.approx(weights, abs=1e-3)
    assert normalized([-1000.0, -1000.0 + math.log(3)]) == pytest.approx([0.25, 0.75])


def test_copies_go_on_with_draws_of_their_own_and_nothing_is_read_twice() -> None:
    backend = FakeBackend(silent, sequences=40, shared=False)
    runner = Scheduler(backend, 32)
    found = outcome("power:8:power-block=4:power-alpha=3", max_tokens=60, runner=runner)
    assert found.fields["resampled"] > 2
    assert len({tuple(c.tokens) for c in found.completions}) > 1
    for answer in found.completions:  # whole, however many parts it has
        assert len(answer.draws) - len(answer.tokens) == (answer.finish_reason == "stop")
        assert answer.text == bytes(answer.tokens).decode(errors="replace")
        assert [c.sample for c in found.completions] == list(range(8))
    begun = sum(len(handle.completions) for handle in found.jobs)
    assert backend.fed <= found.generated_tokens + 2 * begun + 1


def test_cancelled_and_out_of_room_it_has_what_was_said() -> None:
    def after(looks: int) -> Callable[[], bool]:
        left = iter(range(looks))
        return lambda: next(left, None) is None

    with pytest.raises(CancelledError):
        outcome("power:4", cancelled=after(0))
    for looks in (9, 20, 41):
        found = outcome("power:4:power-block=8", script=silent, max_tokens=90, cancelled=after(looks))
        assert {c.finish_reason for c in found.completions} == {"cancelled"}
        assert 0 < len(found.completion.tokens) <= looks
    full = outcome("power:4:power-block=8", script=silent, max_tokens=90, context=60)
    assert {c.finish_reason for c in full.completions} == {"context"}
    with pytest.raises(ContextFullError):
        outcome("power:4", asked="x" * 60, context=60)


def test_rows() -> None:
    lines = [{"custom_id": f"q{i}", "prompt": "x" * (i * 13 % 40)} for i in range(1, 5)]
    how = settings(Chosen("power:3:power-block=6"), SamplingParams(), max_tokens=20)
    found = rows(lines, how, parallel=5)
    assert timeless(found) == timeless(rows(lines, how, parallel=1))
    for each in found:
        assert each["method"] == "power"
        assert len(each["samples"]) == 3
        assert 1 <= each["effective_particles"] <= 3
    refused = row([{"prompt": "hi", "temperature": 0.5}], settings(Chosen("power:2")))
    assert "--method power and --temp contradict each other" in refused["error"]


def test_what_it_refuses() -> None:
    assert Chosen("power").collecting.describe(8) == ["one of 8 particles by p^2"]
    with pytest.raises(UsageError, match="--method power and --temp contradict"):
        Chosen("power").plan(Plan(SamplingParams(temperature=0.5)), frozenset({"temperature"}))
    with pytest.raises(UsageError, match="EM flags contradict"):
        Chosen("power").collecting.check(SamplingParams(em=EMInf(), temperature=1.0, min_p=0.0))
    with pytest.raises(UsageError, match=r"--power-alpha is 0\.5"):
        Chosen("power:3:power-alpha=0.5")
    with pytest.raises(UsageError, match="contradict"):
        outcome("sample:0.7+power:3")
