"""The decode loop on an engine whose every answer is known."""

import itertools
from collections import Counter

import numpy as np
import pytest

from emlocal.backends.base import Feed, Row
from emlocal.backends.fake import END, VOCABULARY, FakeBackend, hashed, saying
from emlocal.em.steps import EMInf
from emlocal.errors import BackendError, CancelledError, ContextFullError, UsageError
from emlocal.generation import Completion, Generator, Piece, Request
from emlocal.sampling import Sampler, SamplingParams, Uniforms

GREEDY = SamplingParams(temperature=0)
WILD = SamplingParams(temperature=1.0, min_p=0.0)
PROMPT = list(b"[user]hi\n[assistant]")


def request(
    n: int = 100, *stop: str, params: SamplingParams = GREEDY, seed: int = 0, sample: int = 0
) -> Request:
    return Request(params, Uniforms(seed, 0, sample), n, stop)


def run(
    backend: FakeBackend, *requests: Request, prompt=PROMPT, **kwargs
) -> tuple[list[Piece], list[Completion]]:
    events = list(Generator(backend).run(prompt, requests, **kwargs))
    pieces = [e for e in events if isinstance(e, Piece)]
    completions = sorted((e for e in events if isinstance(e, Completion)), key=lambda c: c.sample)
    for completion in completions:  # what was streamed is what is returned
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
        assert [p.text for p in pieces][3:5] == ["", "\nt"]  # held back, then let go

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
            FakeBackend(saying("Hello, world")), request(100, "lo"), cancelled=lambda: next(clock) >= 3
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
        backend = FakeBackend(saying("Hello"))
        generator = Generator(backend)
        with pytest.raises(CancelledError):
            list(generator.run(PROMPT, [request()], lambda: True))
        *_, done = generator.run(PROMPT, [request()])
        assert done.text == "Hello"

    def test_more_samples_than_sequences(self) -> None:
        backend = FakeBackend(hashed, sequences=3)
        generator = Generator(backend)
        with pytest.raises(BackendError, match="all 3 sequences"):
            list(generator.run(PROMPT, [request(5, sample=i) for i in range(3)]))
        assert backend.open()  # what was forked is free again
        assert backend.open()


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
        # of each sample, the last token is drawn and not fed
        assert backend.fed == len(PROMPT) + sum(len(c.draws) - 1 for c in completions)

    def test_some_end_before_others(self) -> None:
        backend = FakeBackend(hashed)
        lengths = [1, 5, 3]
        requests = [request(n, params=WILD, seed=7, sample=i) for i, n in enumerate(lengths)]
        pieces, completions = run(backend, *requests)
        assert [len(c.draws) for c in completions] == lengths
        assert Counter(p.sample for p in pieces) == {0: 1, 1: 5, 2: 3}
        assert [p.sample for p in pieces[:3]] == [0, 1, 2]  # side by side, not one after another

    def test_forks_are_released_at_the_end(self) -> None:
        backend = FakeBackend(hashed, sequences=4)
        generator = Generator(backend)
        for _ in range(3):
            list(generator.run(PROMPT, self.requests(3)))
        assert len([backend.open() for _ in range(3)]) == 3

    def test_forks_are_released_when_the_consumer_walks_away(self) -> None:
        backend = FakeBackend(hashed, sequences=4)
        generator = Generator(backend)
        for stop_after in (0, 1, 4):
            events = generator.run(PROMPT, self.requests(3))
            for _ in range(stop_after):
                next(events)
            events.close()
        *_, last = generator.run(PROMPT, [request(5)])
        assert isinstance(last, Completion)
        assert len([backend.open() for _ in range(3)]) == 3

    def test_the_context_ends_all_that_still_run(self) -> None:
        backend = FakeBackend(hashed, context=4 * len(PROMPT) + 10)
        _, completions = run(backend, *self.requests(3, 100))
        assert {c.finish_reason for c in completions} <= {"context", "stop"}
        assert "context" in {c.finish_reason for c in completions}

    def test_cancelling_ends_all(self) -> None:
        clock = itertools.count()
        _, completions = run(FakeBackend(hashed), *self.requests(3), cancelled=lambda: next(clock) >= 2)
        assert [c.finish_reason for c in completions] == ["cancelled"] * 3
        assert [len(c.tokens) for c in completions] == [2, 2, 2]


class TestPrefixReuse:
    def turns(self, backend: FakeBackend) -> tuple[Generator, list[int], list[int]]:
        generator = Generator(backend)
        first = list(b"[user]hi\n[assistant]")
        *_, done = generator.run(first, [request()])
        return generator, first, done.tokens

    def test_the_next_turn_reads_only_what_is_new(self) -> None:
        backend = FakeBackend(saying("Hello", "Bye"))
        generator, first, said = self.turns(backend)
        before = backend.fed
        second = [*first, *said, *b"\n[user]bye\n[assistant]"]
        *_, done = generator.run(second, [request()])
        assert done.text == "Bye"
        assert generator.timings.cached_tokens == len(first) + len(said)
        assert backend.fed - before == len(second) - len(first) - len(said) + len(done.tokens)

    def test_the_same_prompt_again_reads_its_last_token(self) -> None:
        backend = FakeBackend(saying("Hello"))
        generator, first, said = self.turns(backend)
        before = backend.fed
        *_, done = generator.run(first, [request()])
        assert done.text == "Hello"
        assert generator.timings.cached_tokens == len(first) - 1
        assert backend.fed - before == 1 + len(said)

    @pytest.mark.parametrize("trims", [True, False])
    def test_an_edited_prompt_is_as_if_fresh(self, trims) -> None:
        backend = FakeBackend(hashed, trims=trims)
        generator = Generator(backend)
        rng = np.random.default_rng(0)
        prompt = rng.integers(0, 256, 30).tolist()
        for turn in range(8):
            wild = request(6, params=WILD, seed=turn)
            *_, here = generator.run(prompt, [wild])
            *_, fresh = Generator(FakeBackend(hashed)).run(prompt, [wild])
            assert here.tokens == fresh.tokens
            at = int(rng.integers(0, 30))
            prompt = [*prompt[:at], *rng.integers(0, 256, 30 - at).tolist()]

    def test_a_backend_that_cannot_trim_reads_everything_again(self) -> None:
        backend = FakeBackend(saying("Hello", "Bye"), trims=False)
        generator, first, said = self.turns(backend)
        before = backend.fed
        *_, done = generator.run(first, [request()])
        assert done.text == "Hello"
        assert generator.timings.cached_tokens == 0
        assert backend.fed - before == len(first) + len(said)
        *_, done = generator.run([*first, *said, *b"\n[user]bye\n[assistant]"], [request()])
        assert done.text == "Bye"
        assert generator.timings.cached_tokens == len(first) + len(said)  # nothing to cut: only to append

    def test_after_several_samples_the_prompt_is_held(self) -> None:
        backend = FakeBackend(hashed)
        generator = Generator(backend)
        list(generator.run(PROMPT, [request(4, params=WILD, sample=i) for i in range(3)]))
        before = backend.fed
        list(generator.run(PROMPT, [request(1)]))
        assert backend.fed - before == 1

    def test_after_walking_away_or_cancelling_the_cache_is_true(self) -> None:
        backend = FakeBackend(hashed)
        generator = Generator(backend)
        events = generator.run(PROMPT, [request(20, params=WILD)])
        said = [next(events).draw.token for _ in range(5)]
        events.close()
        clock = itertools.count()
        with pytest.raises(CancelledError):
            list(generator.run([*PROMPT, *said[:3], 1, 2, 3], [request()], lambda: next(clock) >= 0))
        follow_up = [*PROMPT, *said, 4, 5]
        *_, here = generator.run(follow_up, [request(8, params=WILD, seed=9)])
        *_, fresh = Generator(FakeBackend(hashed)).run(follow_up, [request(8, params=WILD, seed=9)])
        assert here.tokens == fresh.tokens

    def test_forgetting(self) -> None:
        backend = FakeBackend(saying("Hello"))
        generator, first, _ = self.turns(backend)
        generator.forget()
        list(generator.run(first, [request(1)]))
        assert generator.timings.cached_tokens == 0


def test_timings_count_tokens_of_all_samples() -> None:
    backend = FakeBackend(hashed)
    generator = Generator(backend)
    requests = [request(n, params=WILD, seed=7, sample=i) for i, n in enumerate((2, 4))]
    completions = [e for e in generator.run(PROMPT, requests) if isinstance(e, Completion)]
    timings = generator.timings
    assert timings.prompt_tokens == len(PROMPT)
    assert timings.generated_tokens == sum(len(c.draws) for c in completions) == 6
    assert timings.prompt_seconds > 0
    assert timings.generation_seconds > 0


def test_the_fake_backend_keeps_its_word() -> None:
    """`hashed` depends on every token and their order, or the tests above would show nothing."""
    rows = [hashed(t) for t in ([1, 2], [2, 1], [1, 2, 2], [2, 2])]
    for one, other in itertools.combinations(rows, 2):
        assert abs(one - other).max() > 1
    backend = FakeBackend(hashed)
    sequence = backend.open()
    backend.forward([Feed(sequence, [1, 2])])
    assert backend.sample([Row(sequence, GREEDY, 0.5)])[0].token == rows[0].argmax()
