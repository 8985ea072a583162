"""The contract of every engine, continued: opening, feeding, forking, trimming and releasing sequences."""

import numpy as np
import pytest

from emlocal.backends.base import Feed, Row
from emlocal.errors import BackendError
from emlocal.machine import peak_memory
from tests.backends.contract import EM, SEQUENCES, assert_same_logits, distance, read, said, same, tokens


class TestSequences:
    def test_as_many_as_promised_and_no_more(self, backend) -> None:
        opened = [backend.open() for _ in range(SEQUENCES)]
        assert len(set(opened)) == SEQUENCES
        with pytest.raises(BackendError, match=f"all {SEQUENCES} sequences"):
            backend.open()
        with pytest.raises(BackendError):
            backend.fork(opened[0])
        backend.release(opened[2])
        assert backend.open() == opened[2]

    def test_lengths(self, backend) -> None:
        ids = tokens(backend)
        sequence = backend.open()
        assert backend.length(sequence) == 0
        backend.forward([Feed(sequence, ids)])
        backend.forward([Feed(sequence, ids[1:3])])
        assert backend.length(sequence) == len(ids) + 2
        backend.release(sequence)
        assert backend.length(backend.open()) == 0

    def test_a_sequence_reopened_remembers_nothing(self, backend) -> None:
        ids = tokens(backend)
        first = read(backend, ids)
        expected = backend.logits(first)
        backend.release(first)
        read(backend, ids[::-1])
        backend.release(first)
        again = read(backend, ids)
        assert again == first
        assert_same_logits(backend, backend.logits(again), expected)

    def test_in_one_piece_in_chunks_and_token_by_token(self, backend) -> None:
        ids = tokens(backend)
        whole = backend.logits(read(backend, ids))
        chunks = backend.logits(read(backend, ids[:3], ids[3:4], ids[4:]))
        single = backend.logits(read(backend, *([t] for t in ids)))
        assert_same_logits(backend, whole, chunks)
        assert_same_logits(backend, whole, single)

    def test_logits_are_a_copy(self, backend) -> None:
        sequence = read(backend, tokens(backend))
        row = backend.logits(sequence)
        row[:] = 0
        assert backend.logits(sequence).any()
        kept = backend.logits(sequence)
        before = kept.copy()
        backend.forward([Feed(sequence, [5])])
        np.testing.assert_array_equal(kept, before)

    def test_logits_depend_on_what_came_before(self, backend) -> None:
        ids = tokens(backend)
        one = backend.logits(read(backend, ids))
        other = backend.logits(read(backend, [ids[0], *ids[2:]]))
        assert distance(one, other) > 2 * same(backend)

    def test_a_fork_continues_like_its_parent_and_leaves_it_alone(self, backend) -> None:
        ids = tokens(backend)
        parent = read(backend, ids)
        alone = said(backend, parent, 6)
        backend.trim(parent, len(ids) - 1)
        backend.forward([Feed(parent, ids[-1:])])
        copies = [backend.fork(parent) for _ in range(3)]
        assert [backend.length(c) for c in copies] == [len(ids)] * 3
        backend.forward([Feed(copies[0], alone[:1]), Feed(copies[1], [7])])
        assert backend.length(parent) == backend.length(copies[2]) == len(ids)
        assert backend.length(copies[0]) == len(ids) + 1
        backend.forward([Feed(parent, alone[:1])])
        expected = backend.logits(parent)
        backend.release(parent)
        backend.forward([Feed(copies[2], alone[:1])])
        assert_same_logits(backend, backend.logits(copies[2]), expected)

    def test_trimming_forgets_exactly_the_end(self, backend) -> None:
        ids = tokens(backend)
        sequence = read(backend, ids, [9, 8, 7])
        assert backend.trim(sequence, len(ids)) == len(ids) == backend.length(sequence)
        backend.forward([Feed(sequence, [5, 6])])
        trimmed = backend.logits(sequence)
        assert_same_logits(backend, trimmed, backend.logits(read(backend, [*ids, 5, 6])))

    def test_trimming_to_the_length_or_beyond_is_nothing(self, backend) -> None:
        sequence = read(backend, [1, 2, 3])
        assert backend.trim(sequence, 3) == 3
        assert backend.trim(sequence, 99) == 3
        assert backend.trim(sequence, 0) == 0
        assert backend.length(sequence) == 0
        backend.forward([Feed(sequence, [4])])
        assert backend.length(sequence) == 1

    def test_trimmed_to_nothing_it_is_as_new(self, backend) -> None:
        ids = tokens(backend)
        sequence = read(backend, ids[::-1], [5, 6])
        assert backend.trim(sequence, 0) == 0
        backend.forward([Feed(sequence, ids)])
        assert_same_logits(backend, backend.logits(sequence), backend.logits(read(backend, ids)))

    def test_two_hundred_opened_fed_forked_and_released_leave_no_memory_taken(self, backend) -> None:
        ids = tokens(backend)
        first = read(backend, ids)
        expected = backend.logits(first)
        backend.release(first)

        def rounds(n: int) -> int:
            for _ in range(n):
                sequence = read(backend, ids)
                copy = backend.fork(sequence)
                backend.forward([Feed(copy, [5]), Feed(sequence, [6])])
                backend.sample([Row(sequence, EM, 0.5), Row(copy, EM, 0.5)])
                backend.release(sequence)
                backend.release(copy)
            return backend.memory_bytes()

        before, peak = rounds(5), peak_memory()
        assert rounds(200 if backend.info.vocabulary < 1000 else 20) == before
        assert peak_memory() - peak < 30_000_000
        assert_same_logits(backend, backend.logits(read(backend, ids)), expected)

    def test_trimming_a_fork_leaves_the_parent(self, backend) -> None:
        ids = tokens(backend)
        parent = read(backend, ids)
        fork = backend.fork(parent)
        backend.trim(fork, 2)
        backend.forward([Feed(parent, [5])])
        assert_same_logits(backend, backend.logits(parent), backend.logits(read(backend, [*ids, 5])))

    def test_interleaved_sequences_are_as_when_alone(self, backend) -> None:
        base = tokens(backend)
        prompts = [base, base[:4], base[::-1], base[2:]]
        alone = []
        for prompt in prompts:
            sequence = read(backend, prompt, [5], [6, 7])
            alone.append(backend.logits(sequence))
            backend.release(sequence)
        opened = [backend.open() for _ in prompts]
        backend.forward([Feed(s, p) for s, p in zip(opened, prompts, strict=True)])
        backend.forward([Feed(s, [5]) for s in reversed(opened)])
        backend.forward([Feed(opened[2], [6, 7]), Feed(opened[0], [6, 7])])
        rows = {0: backend.logits(opened[0]), 2: backend.logits(opened[2])}
        backend.forward([Feed(opened[1], [6, 7]), Feed(opened[3], [6, 7])])
        rows |= {1: backend.logits(opened[1]), 3: backend.logits(opened[3])}
        for i, expected in enumerate(alone):
            assert_same_logits(backend, rows[i], expected)

    def test_prompts_and_single_steps_in_one_call(self, backend) -> None:
        ids = tokens(backend)
        running = read(backend, ids)
        new = backend.open()
        backend.forward([Feed(running, [5]), Feed(new, ids[:6])])
        assert_same_logits(backend, backend.logits(running), backend.logits(read(backend, [*ids, 5])))
