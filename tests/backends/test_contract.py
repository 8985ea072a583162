"""The contract of every engine (emlocal/backends/base.py): one suite of tests, run on each."""

import itertools

import numpy as np
import pytest

from emlocal.backends.base import Feed, Row
from emlocal.backends.fake import FakeBackend
from emlocal.backends.mlx.backend import MLXBackend
from emlocal.backends.torch.backend import TorchBackend
from emlocal.errors import CancelledError, ContextFullError
from emlocal.sampling import SamplingParams
from tests.backends.contract import (
    CONTEXT,
    EM,
    LONG,
    SEQUENCES,
    assert_same_logits,
    read,
    said,
    tokens,
)

TEXTS = [
    "the cat sat on the mat",
    "naïve café — 2 × 3 = 6",
    "日本語 and עברית",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "line\nline\t\ttab  two",
    "\x00\x7f",
]


class TestText:
    @pytest.mark.parametrize("text", TEXTS)
    def test_round_trip(self, backend, text) -> None:
        ids = backend.encode(text, add_special=False, parse_special=False)
        assert ids
        assert all(0 <= t < backend.info.vocabulary for t in ids)
        decoded = b"".join(backend.token_bytes(t) for t in ids).decode()
        assert decoded in (text, " " + text)  # SentencePiece puts a space in front

    def test_every_token_has_bytes_or_is_a_control_token(self, backend) -> None:
        pieces = [backend.token_bytes(t) for t in range(min(backend.info.vocabulary, 3000))]
        assert sum(not piece for piece in pieces) < 30
        for token in backend.info.end_tokens:
            assert backend.token_bytes(token) == b""

    def test_nothing_is_no_tokens(self, backend) -> None:
        assert backend.encode("", add_special=False, parse_special=True) == []

    def test_special_tokens_only_when_asked_for(self, backend) -> None:
        text = "<|im_end|>"
        if isinstance(backend, FakeBackend):  # it has none, so this is text either way
            assert backend.encode(text, add_special=False, parse_special=True) == list(text.encode())
            return
        assert backend.encode(text, add_special=False, parse_special=True)[-1] in backend.info.end_tokens
        plain = backend.encode(text, add_special=False, parse_special=False)
        assert not backend.info.end_tokens & set(plain)
        assert b"".join(map(backend.token_bytes, plain)).decode().strip() == text

    def test_surrogates_do_not_crash(self, backend) -> None:
        if not isinstance(backend, FakeBackend):
            assert backend.encode("a\ud800b", add_special=False, parse_special=False)


class TestInfo:
    def test_info(self, backend) -> None:
        info = backend.info
        assert info.vocabulary > 256
        assert info.end_tokens
        assert all(0 <= t < info.vocabulary for t in info.end_tokens)
        assert info.trained_context >= CONTEXT
        assert backend.context == CONTEXT
        assert backend.max_sequences == SEQUENCES
        assert info.chat_template
        assert info.name
        assert backend.name in ("fake", "llama.cpp", "mlx", "torch")

    def test_memory(self, backend) -> None:
        assert backend.memory_bytes() > 0

    def test_describe(self, backend) -> None:
        assert f"context {CONTEXT}" in backend.describe()


class TestSampling:
    def test_rows_together_are_as_one_at_a_time(self, backend) -> None:
        ids = tokens(backend)
        opened = [backend.open() for _ in range(3)]
        backend.forward([Feed(s, ids[i:]) for i, s in enumerate(opened)])
        rows = [
            Row(s, params, u, ids)
            for s, params, u in itertools.product(
                opened, (EM, SamplingParams(), SamplingParams(repeat_penalty=1.5)), (0.0, 0.3, 1 - 2**-53)
            )
        ]
        together = backend.sample(rows)
        assert together == [backend.sample([row])[0] for row in rows]
        assert backend.sample(rows[::-1]) == together[::-1]
        assert len({draw.token for draw in together}) > 1

    def test_no_rows_are_no_draws(self, backend) -> None:
        sequence = backend.open()
        assert backend.sample([]) == []
        backend.forward([Feed(sequence, tokens(backend), wanted=False)])
        assert backend.sample([]) == []
        backend.forward([Feed(sequence, [5])])
        assert backend.sample([]) == []

    def test_a_sequence_whose_row_nobody_wanted_has_none(self, backend) -> None:
        sequence, other = backend.open(), backend.open()
        backend.forward([Feed(sequence, [5]), Feed(other, [6], wanted=False)])
        assert backend.logits(sequence).any()
        with pytest.raises(KeyError):
            backend.logits(other)
        backend.forward([Feed(other, [7])])
        with pytest.raises(KeyError):
            backend.sample([Row(sequence, EM, 0.5)])

    def test_greedy_takes_the_largest_logit(self, backend) -> None:
        sequence = read(backend, tokens(backend))
        draw = backend.sample([Row(sequence, SamplingParams(temperature=0), 0.5)])[0]
        assert draw.token == backend.logits(sequence).argmax()

    def test_the_same_seed_says_the_same(self, backend) -> None:
        ids = tokens(backend)
        runs = [said(backend, read(backend, ids), 8, seed=seed) for seed in (3, 3, 4)]
        assert runs[0] == runs[1] != runs[2]


class TestErrors:
    @pytest.mark.parametrize("extra", [1, 50, 1000])
    def test_more_than_the_context_is_refused_and_changes_nothing(self, backend, extra) -> None:
        ids = tokens(backend)
        sequence = read(backend, ids)
        expected = backend.logits(sequence)
        with pytest.raises(ContextFullError, match=str(CONTEXT)):
            backend.forward([Feed(sequence, (ids * 400)[: CONTEXT - len(ids) + extra])])
        assert backend.length(sequence) == len(ids)
        backend.trim(sequence, len(ids) - 1)
        backend.forward([Feed(sequence, ids[-1:])])
        assert_same_logits(backend, backend.logits(sequence), expected)

    def test_exactly_the_context_fits(self, backend) -> None:
        ids = (tokens(backend) * CONTEXT)[:CONTEXT]
        sequence = read(backend, ids)
        assert backend.length(sequence) == CONTEXT
        with pytest.raises(ContextFullError):
            backend.forward([Feed(sequence, [5])])
        assert backend.length(sequence) == CONTEXT

    def test_full_at_a_step_and_shortened_it_goes_on(self, backend) -> None:
        ids = (tokens(backend) * CONTEXT)[:CONTEXT]
        sequence = read(backend, ids[:-1], ids[-1:])
        with pytest.raises(ContextFullError, match=r"1 more token|1 new"):
            backend.forward([Feed(sequence, [5])])
        assert backend.trim(sequence, 10) == 10
        backend.forward([Feed(sequence, [5])])
        row = backend.logits(sequence)
        backend.release(sequence)
        assert_same_logits(backend, row, backend.logits(read(backend, [*ids[:10], 5])))

    def test_what_no_engine_can_compute_is_refused_and_changes_nothing(self, backend) -> None:
        ids = tokens(backend)
        sequence, other = read(backend, ids), backend.open()
        for feeds, message in (
            ([], "at least one sequence"),
            ([Feed(sequence, [5]), Feed(sequence, [6])], "each only once"),
            ([Feed(other, [5]), Feed(sequence, [])], f"sequence {sequence} is fed no tokens"),
            ([Feed(other, [5]), Feed(sequence, [5, backend.info.vocabulary])], "there is no token"),
            ([Feed(sequence, [5, -1, 7])], "there is no token -1"),
        ):
            with pytest.raises(ValueError, match=message):
                backend.forward(feeds)
        assert (backend.length(sequence), backend.length(other)) == (len(ids), 0)
        backend.forward([Feed(sequence, [backend.info.vocabulary - 1])])
        expected = backend.logits(read(backend, [*ids, backend.info.vocabulary - 1]))
        backend.forward([Feed(other, [5])])
        backend.trim(sequence, len(ids))
        backend.forward([Feed(sequence, [backend.info.vocabulary - 1])])
        assert_same_logits(backend, backend.logits(sequence), expected)

    def test_sequences_that_share_their_room_hold_no_more_than_the_context(self, backend) -> None:
        ids = (tokens(backend) * CONTEXT)[: CONTEXT // 2]
        one, other = read(backend, ids), read(backend, ids[:-2])
        if isinstance(backend, TorchBackend | MLXBackend):  # each sequence has its own room
            backend.forward([Feed(one, [5, 6]), Feed(other, [5])])
            assert (backend.length(one), backend.length(other)) == (len(ids) + 2, len(ids) - 1)
            backend.trim(one, len(ids))
            backend.trim(other, len(ids) - 2)
        else:
            with pytest.raises(ContextFullError):
                backend.forward([Feed(one, [5, 6]), Feed(other, [5])])
        assert (backend.length(one), backend.length(other)) == (len(ids), len(ids) - 2)
        backend.release(one)
        backend.forward([Feed(other, [5, 6, 7])])
        row = backend.logits(other)
        backend.release(other)
        assert_same_logits(backend, row, backend.logits(read(backend, [*ids[:-2], 5, 6, 7])))

    def test_forks_of_a_long_prompt_have_room_to_go_on(self, backend) -> None:
        ids = (tokens(backend) * CONTEXT)[:180]
        parent = read(backend, ids)
        forks = [parent, *(backend.fork(parent) for _ in range(3))]
        feeds = [Feed(fork, [5 + i] * 15) for i, fork in enumerate(forks)]
        if isinstance(backend, FakeBackend):  # it copies, and counts copies
            with pytest.raises(ContextFullError):
                backend.forward(feeds)
            return
        backend.forward(feeds)
        row = backend.logits(forks[3])
        for fork in forks:
            backend.release(fork)
        assert_same_logits(backend, row, backend.logits(read(backend, [*ids, *[8] * 15])))

    def test_cancelled_while_reading(self, backend) -> None:
        ids = tokens(backend)
        long = (ids * CONTEXT)[:200]
        sequence = read(backend, ids)
        expected = backend.logits(sequence)
        asked = itertools.count()
        for patience in (0,) if isinstance(backend, FakeBackend) else (0, 2):
            with pytest.raises(CancelledError):
                backend.forward([Feed(sequence, long)], lambda limit=patience: next(asked) >= limit)
            assert backend.length(sequence) == len(ids)
        backend.trim(sequence, len(ids) - 1)
        backend.forward([Feed(sequence, ids[-1:])])
        assert_same_logits(backend, backend.logits(sequence), expected)
        backend.forward([Feed(sequence, long)])  # it also forgets the last call's flag
        assert backend.length(sequence) == len(ids) + 200

    def test_an_unknown_sequence_leaves_the_others_usable(self, backend) -> None:
        ids = tokens(backend)
        sequence = read(backend, ids)
        with pytest.raises(KeyError):
            backend.forward([Feed(sequence, [5]), Feed(SEQUENCES - 1, [6])])
        if backend.length(sequence) == len(ids):
            backend.forward([Feed(sequence, [5])])
        assert_same_logits(backend, backend.logits(sequence), backend.logits(read(backend, [*ids, 5])))


class TestLongPrompts:
    def test_cancelled_in_the_middle_and_read_again(self, roomy) -> None:
        """Feeds 4,000 tokens: the engine splits them, and checks for cancellation in between."""
        ids = np.random.default_rng(2).integers(3, 250, LONG).tolist()
        asked = 0

        def count() -> bool:
            nonlocal asked
            asked += 1
            return False

        sequence = roomy.open()
        roomy.forward([Feed(sequence, ids)], count)
        whole = roomy.logits(sequence)
        roomy.trim(sequence, 0)
        roomy.forward([Feed(sequence, ids[:300])])
        assert isinstance(roomy, FakeBackend) or asked > 6
        left = itertools.count(asked // 2, -1)
        with pytest.raises(CancelledError):
            roomy.forward([Feed(sequence, ids[300:])], lambda: next(left) <= 0)
        assert roomy.length(sequence) == 300
        for start in range(300, LONG, 700):
            roomy.forward([Feed(sequence, ids[start : start + 700], wanted=start + 700 >= LONG)])
        assert roomy.length(sequence) == LONG
        assert_same_logits(roomy, roomy.logits(sequence), whole)
        roomy.release(sequence)
