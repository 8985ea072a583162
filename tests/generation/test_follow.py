"""One job at a time on an engine with known answers: the runner as generate and chat use it."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emlocal.backends.base import Feed, Row
from emlocal.backends.fake import END, VOCABULARY, FakeBackend, hashed, saying
from emlocal.em.steps import EMInf
from emlocal.errors import CancelledError, ContextFullError, LogitsError, UsageError
from emlocal.generation import Completed, Completion, Event, Job, Request, Scheduler, Token
from emlocal.sampling import Sampler, SamplingParams, Uniforms

GREEDY = SamplingParams(temperature=0)
WILD = SamplingParams(temperature=1.0, min_p=0.0)
PROMPT = list(b"[user]hi\n[assistant]")


def request(
    n: int = 100, *stop: str, params: SamplingParams = GREEDY, seed: int = 0, sample: int = 0
) -> Request:
    return Request(params, Uniforms(seed, 0, sample), n, stop)


def scheduler(backend: FakeBackend, parallel: int = 1) -> Scheduler:
    return Scheduler(backend, parallel)


def events(runner: Scheduler, prompt: list[int], *requests: Request, **kwargs: Any) -> list[Event]:
    """Returns the events of a job of the one session."""
    return list(runner.follow([Job(prompt, requests, at_once=True, session="chat")], **kwargs))


def answer(runner: Scheduler, prompt: list[int], *requests: Request, **kwargs: Any) -> Completion:
    """Returns the last completion."""
    completed = [e for e in events(runner, prompt, *requests, **kwargs) if isinstance(e, Completed)]
    return completed[-1].completion


def cached(runner: Scheduler, prompt: list[int], *requests: Request) -> int:
    """Returns how much of the prompt was cached."""
    return events(runner, prompt, *requests)[0].handle.timings.cached_tokens


def run(
    backend: FakeBackend, *requests: Request, prompt: list[int] = PROMPT, **kwargs: Any
) -> tuple[list[Token], list[Completion]]:
    found = events(scheduler(backend, len(requests)), prompt, *requests, **kwargs)
    pieces = [e for e in found if isinstance(e, Token)]
    completions = [e.completion for e in found if isinstance(e, Completed)]
    completions.sort(key=lambda completion: completion.sample)
    for completion in completions:  # the streamed text is the returned one
        shown = "".join(p.text for p in pieces if p.sample == completion.sample)
        assert shown + completion.tail == completion.text
        draws = [p.draw for p in pieces if p.sample == completion.sample]
        assert draws == completion.draws
    return pieces, completions


class TestOneSample:
    def test_exact_text(self) -> None:
        pieces, [done] = run(FakeBackend(saying("Hello, wörld! 🙂")), request())
        assert done.text == "Hello, wörld! 🙂"
        assert done.tokens == list("Hello, wörld! 🙂".encode())
        assert (done.finish_reason, done.stop, done.tail) == ("stop", None, "")
        assert done.draws[-1].token == END
        assert len(done.draws) == len(done.tokens) + 1
        assert "\ufffd" not in "".join(p.text for p in pieces)

    def test_characters_are_streamed_whole(self) -> None:
        pieces, _ = run(FakeBackend(saying("é€🙂")), request())
        assert [p.text for p in pieces] == ["", "é", "", "", "€", "", "", "", "🙂", ""]

    def test_max_tokens(self) -> None:
        _, [done] = run(FakeBackend(saying("Hello")), request(3))
        assert (done.text, done.finish_reason, len(done.draws)) == ("Hel", "length", 3)

    def test_max_tokens_in_the_midst_of_a_character(self) -> None:
        _, [done] = run(FakeBackend(saying("a€")), request(2))
        assert (done.text, done.tail) == ("a\ufffd", "\ufffd")

    def test_max_tokens_exactly_at_the_end(self) -> None:
        _, [done] = run(FakeBackend(saying("Hello")), request(5))
        assert (done.text, done.finish_reason) == ("Hello", "length")
        _, [done] = run(FakeBackend(saying("Hello")), request(6))
        assert (done.text, done.finish_reason) == ("Hello", "stop")

    def test_an_answer_of_nothing(self) -> None:
        pieces, [done] = run(FakeBackend(saying("")), request())
        assert (done.text, done.tokens, done.finish_reason) == ("", [], "stop")
        assert len(pieces) == 1

    def test_invalid_bytes_become_replacement_characters(self) -> None:
        def script(tokens):
            row = np.zeros(VOCABULARY, np.float32)
            said = tokens[len(PROMPT) :]
            row[[0xFF, 0xE2, 0x41, 0x80, END][len(said)]] = 9
            return row

        _, [done] = run(FakeBackend(script), request())
        assert done.text == bytes([0xFF, 0xE2, 0x41, 0x80]).decode(errors="replace")

    def test_stop_strings_across_tokens(self) -> None:
        pieces, [done] = run(FakeBackend(saying("one\ntwo\n\nthree")), request(100, "\n\n", "four"))
        assert (done.text, done.finish_reason, done.stop) == ("one\ntwo", "stop", "\n\n")
        assert done.tokens == list(b"one\ntwo\n\n")
        assert [p.text for p in pieces][3:5] == ["", "\nt"]  # held back, then released

    def test_a_stop_string_never_completed_is_shown(self) -> None:
        _, [done] = run(FakeBackend(saying("wait EN")), request(100, "END"))
        assert (done.text, done.tail, done.finish_reason, done.stop) == ("wait EN", "EN", "stop", None)
        _, [done] = run(FakeBackend(saying("wait ENough")), request(7, "END"))
        assert (done.text, done.tail, done.finish_reason) == ("wait EN", "EN", "length")

    def test_the_last_token_allowed_may_complete_a_stop(self) -> None:
        _, [done] = run(FakeBackend(saying("aXb")), request(2, "X"))
        assert (done.text, done.finish_reason, done.stop) == ("a", "stop", "X")

    def test_context_full(self) -> None:
        _, [done] = run(FakeBackend(saying("x" * 99), context=len(PROMPT) + 4), request())
        assert (done.text, done.finish_reason) == ("x" * 5, "context")

    def test_cancelled_midway_keeps_what_there_is(self) -> None:
        clock = itertools.count()
        _, [done] = run(
            FakeBackend(saying("Hello, world")), request(100, "lo"), cancelled=lambda: next(clock) >= 4
        )
        assert done.finish_reason == "cancelled"
        assert done.text == "Hel"
        assert done.tail == "l"

    def test_draws_are_those_of_the_sampler(self) -> None:
        params = SamplingParams(em=EMInf(0.5, 5, 1.0), temperature=0.9, repeat_penalty=1.2, repeat_last_n=-1)
        backend = FakeBackend(hashed)
        _, [done] = run(backend, request(20, params=params, seed=3))
        sampler, seen = Sampler(VOCABULARY), list(PROMPT)
        for t, draw in enumerate(done.draws):
            assert draw == sampler.sample(hashed(seen), params, Uniforms(3)[t], seen)
            seen.append(draw.token)
        assert len(done.draws) == 20 or done.finish_reason == "stop"


class TestErrors:
    def test_an_empty_prompt(self) -> None:
        with pytest.raises(UsageError, match="prompt is empty"):
            run(FakeBackend(), request(), prompt=[])

    @pytest.mark.parametrize("extra", [0, 1, 500])
    def test_a_prompt_that_leaves_no_room(self, extra) -> None:
        backend = FakeBackend(context=len(PROMPT) - extra) if extra < 10 else FakeBackend(context=5)
        with pytest.raises(ContextFullError) as caught:
            run(backend, request())
        assert f"{len(PROMPT)} tokens" in caught.value.message
        assert f"{backend.context}" in caught.value.message
        assert "--context" in caught.value.hint
        assert backend.fed == 0

    def test_cancelled_while_reading_and_then_again(self) -> None:
        for looks in (0, 1):  # before the pass, and in it
            runner, clock = scheduler(FakeBackend(saying("Hello"))), itertools.count()
            with pytest.raises(CancelledError):
                events(runner, PROMPT, request(), cancelled=lambda: next(clock) >= looks)  # noqa: B023
            assert runner.idle
            assert answer(runner, PROMPT, request()).text == "Hello"

    def test_more_samples_than_sequences(self) -> None:
        with pytest.raises(UsageError, match="3 samples at once need 4 sequences; the backend holds 3"):
            scheduler(FakeBackend(hashed, sequences=3), 3)

    def test_more_samples_than_places_take_turns(self) -> None:
        requests = [request(5, params=WILD, sample=i) for i in range(5)]
        found = events(scheduler(FakeBackend(hashed, sequences=3), 2), PROMPT, *requests)
        _, together = run(FakeBackend(hashed), *requests)
        done = sorted((e.completion for e in found if isinstance(e, Completed)), key=lambda c: c.sample)
        assert [c.draws for c in done] == [c.draws for c in together]

    def test_a_row_that_is_no_distribution(self) -> None:
        def script(tokens: Sequence[int]) -> NDArray[np.float32]:
            return np.full(VOCABULARY, np.nan, np.float32)

        backend = FakeBackend(script)
        runner = scheduler(backend)
        [finished] = events(runner, PROMPT, request())
        with pytest.raises(LogitsError):
            finished.handle.result()
        assert runner.idle


class TestSeveralSamples:
    def requests(self, n: int, length: int = 12) -> list[Request]:
        return [request(length, params=WILD, seed=7, sample=i) for i in range(n)]

    def test_each_is_what_it_would_be_alone(self) -> None:
        _, together = run(FakeBackend(hashed), *self.requests(4))
        alone = [run(FakeBackend(hashed), r)[1][0] for r in self.requests(4)]
        assert [c.tokens for c in together] == [c.tokens for c in alone]
        assert [c.sample for c in together] == [0, 1, 2, 3]
        assert len({tuple(c.tokens) for c in together}) == 4

    def test_the_prompt_is_read_once(self) -> None:
        backend = FakeBackend(hashed)
        _, completions = run(backend, *self.requests(4))
        # the last token of each sample is drawn and not fed
        assert backend.fed == len(PROMPT) + sum(len(c.draws) - 1 for c in completions)

    def test_some_end_before_others(self) -> None:
        backend = FakeBackend(hashed)
        lengths = [1, 5, 3]
        requests = [request(n, params=WILD, seed=7, sample=i) for i, n in enumerate(lengths)]
        pieces, completions = run(backend, *requests)
        assert [len(c.draws) for c in completions] == lengths
        assert Counter(p.sample for p in pieces) == {0: 1, 1: 5, 2: 3}
        assert [p.sample for p in pieces[:3]] == [0, 1, 2]  # side by side, not one after another

    def test_nothing_is_held_after_closing(self) -> None:
        backend = FakeBackend(hashed, sequences=4)
        for stop_after in (0, 1, 4, None):
            with scheduler(backend, 3) as runner:
                running = runner.follow([Job(PROMPT, self.requests(3), at_once=True)])
                for _ in itertools.islice(running, stop_after):
                    pass
                running.close()
                assert runner.idle
            assert [backend.open() for _ in range(4)] == [0, 1, 2, 3]
            for sequence in range(4):
                backend.release(sequence)

    def test_the_context_ends_all_that_still_run(self) -> None:
        backend = FakeBackend(hashed, context=4 * len(PROMPT) + 10)
        _, completions = run(backend, *self.requests(3, 100))
        assert {c.finish_reason for c in completions} <= {"context", "stop"}
        assert "context" in {c.finish_reason for c in completions}

    def test_cancelling_ends_all(self) -> None:
        clock = itertools.count()
        _, completions = run(FakeBackend(hashed), *self.requests(3), cancelled=lambda: next(clock) >= 3)
        assert [c.finish_reason for c in completions] == ["cancelled"] * 3
        assert [len(c.tokens) for c in completions] == [2, 2, 2]


class TestPrefixReuse:
    def turns(self, backend: FakeBackend) -> tuple[Scheduler, list[int], list[int]]:
        runner = scheduler(backend)
        first = list(b"[user]hi\n[assistant]")
        return runner, first, answer(runner, first, request()).tokens

    def test_the_next_turn_reads_only_what_is_new(self) -> None:
        backend = FakeBackend(saying("Hello", "Bye"))
        runner, first, said = self.turns(backend)
        before = backend.fed
        second = [*first, *said, *b"\n[user]bye\n[assistant]"]
        assert cached(runner, second, request()) == len(first) + len(said)
        assert backend.fed - before == len(second) - len(first) - len(said) + len("Bye")

    def test_the_same_prompt_again_reads_its_last_token(self) -> None:
        backend = FakeBackend(saying("Hello"))
        runner, first, said = self.turns(backend)
        before = backend.fed
        assert cached(runner, first, request()) == len(first) - 1
        assert backend.fed - before == 1 + len(said)

    @pytest.mark.parametrize("session", ["chat", None])
    @pytest.mark.parametrize("trims", [True, False])
    def test_an_edited_prompt_is_as_if_fresh(self, trims: bool, session: str | None) -> None:
        runner = scheduler(FakeBackend(hashed, trims=trims))
        rng = np.random.default_rng(0)
        prompt = rng.integers(0, 256, 30).tolist()
        for turn in range(12):
            wild = request(6, params=WILD, seed=turn)
            [handle] = {e.handle for e in runner.follow([Job(prompt, [wild], True, session)])}
            assert handle.completions[0].tokens == answer(scheduler(FakeBackend()), prompt, wild).tokens
            at = int(rng.integers(0, 30))
            prompt = [*prompt[:at], *rng.integers(0, 256, 30 - at).tolist()]

    def test_a_backend_that_cannot_trim_reads_everything_again(self) -> None:
        backend = FakeBackend(saying("Hello", "Bye"), trims=False)
        runner, first, said = self.turns(backend)
        before = backend.fed
        assert cached(runner, first, request()) == 0
        assert backend.fed - before == len(first) + len(said)
        second = [*first, *said, *b"\n[user]bye\n[assistant]"]
        assert cached(runner, second, request()) == len(first) + len(said)  # nothing to cut, only to append

    def test_after_several_samples_the_prompt_is_held(self) -> None:
        backend = FakeBackend(hashed)
        runner = scheduler(backend, 3)
        events(runner, PROMPT, *(request(4, params=WILD, sample=i) for i in range(3)))
        before = backend.fed
        events(runner, PROMPT, request(1))
        assert backend.fed - before == 1

    def test_after_walking_away_or_cancelling_the_cache_is_true(self) -> None:
        backend = FakeBackend(hashed)
        runner = scheduler(backend)
        running = runner.follow([Job(PROMPT, [request(20, params=WILD)], True, "chat")])
        said = [e.draw.token for e in itertools.islice(running, 5) if isinstance(e, Token)]
        running.close()
        with pytest.raises(CancelledError):
            events(runner, [*PROMPT, *said[:3], 1, 2, 3], request(), cancelled=lambda: True)
        follow_up = [*PROMPT, *said, 4, 5]
        wild = request(8, params=WILD, seed=9)
        here = answer(runner, follow_up, wild)
        assert here.tokens == answer(scheduler(FakeBackend(hashed)), follow_up, wild).tokens

    def test_forgetting(self) -> None:
        backend = FakeBackend(saying("Hello"))
        runner, first, _ = self.turns(backend)
        runner.forget()
        assert cached(runner, first, request(1)) == 0


def test_timings_count_tokens_of_all_samples() -> None:
    requests = [request(n, params=WILD, seed=7, sample=i) for i, n in enumerate((2, 4))]
    found = events(scheduler(FakeBackend(hashed), 2), PROMPT, *requests)
    timings = found[-1].handle.timings
    assert timings.prompt_tokens == len(PROMPT)
    completions = [e.completion for e in found if isinstance(e, Completed)]
    assert timings.generated_tokens == sum(len(c.draws) for c in completions) == 6
    assert timings.prompt_seconds > 0
    assert timings.generation_seconds > 0


def test_the_fake_backend_keeps_its_word() -> None:
    """`hashed` depends on every token and their order; otherwise the tests above would show nothing."""
    rows = [hashed(t) for t in ([1, 2], [2, 1], [1, 2, 2], [2, 2])]
    for one, other in itertools.combinations(rows, 2):
        assert abs(one - other).max() > 1
    backend = FakeBackend(hashed)
    sequence = backend.open()
    backend.forward([Feed(sequence, [1, 2])])
    assert backend.sample([Row(sequence, GREEDY, 0.5)])[0].token == rows[0].argmax()
