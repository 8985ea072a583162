"""What every engine must do (emlocal/backends/base.py), tried on each: one suite, the same demands."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from emlocal.backends.base import Backend, Feed, LoadOptions, Row
from emlocal.backends.fake import FakeBackend
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.backends.mlx import opening as mlx
from emlocal.backends.mlx.backend import MLXBackend
from emlocal.backends.torch.backend import TorchBackend
from emlocal.backends.torch.opening import open_folder
from emlocal.em import EMInf
from emlocal.errors import BackendError, CancelledError, ContextFullError
from emlocal.sampling import SamplingParams, Uniforms

CONTEXT, SEQUENCES = 256, 5
TEXTS = [
    "the cat sat on the mat",
    "naïve café — 2 × 3 = 6",
    "日本語 and עברית",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "line\nline\t\ttab  two",
    "\x00\x7f",
]
EM = SamplingParams(em=EMInf(0.1, 5, 1.0), temperature=1.0, min_p=0.0)


@pytest.fixture(
    scope="module",
    params=[
        "fake",
        "llama.cpp tiny",
        "torch tiny",
        "torch tiny, sampling on the device",
        "mlx tiny",
        "mlx tiny, sampling on the device",
        pytest.param("llama.cpp smollm2", marks=pytest.mark.real),
        pytest.param("torch smollm2", marks=pytest.mark.real),
        pytest.param("mlx smollm2", marks=pytest.mark.real),
    ],
)
def loaded(request: pytest.FixtureRequest) -> Iterator[Backend]:
    options = LoadOptions(context=CONTEXT, sequences=SEQUENCES, threads=1)
    if request.param == "fake":
        backend: Backend = FakeBackend(context=CONTEXT, sequences=SEQUENCES)
    elif request.param.startswith(("torch", "mlx")):
        folder = request.getfixturevalue("unpacked_tiny" if "tiny" in request.param else "unpacked_smollm2")
        on_device = "device" in request.param
        open_ = mlx.open_folder if "mlx" in request.param else open_folder
        backend = open_(folder, options, device="cpu", dtype="float32", on_device_sampler=on_device)
    else:
        model = request.getfixturevalue("tiny_model" if "tiny" in request.param else "smollm2")
        backend = LlamaCppBackend(model, options)
    yield backend
    backend.close()


@pytest.fixture
def backend(loaded: Backend) -> Iterator[Backend]:
    """A loaded engine with no sequence open, and none left open by the test before."""
    yield loaded
    for sequence in range(SEQUENCES):
        try:
            loaded.length(sequence)
        except KeyError:
            continue
        loaded.release(sequence)


def tokens(backend: Backend, text: str = "the cat sat on the mat and the rat") -> list[int]:
    return backend.encode(text, add_special=True, parse_special=True)


def read(backend: Backend, *chunks: list[int]) -> int:
    """A new sequence that was fed these chunks."""
    sequence = backend.open()
    for chunk in chunks:
        backend.forward([Feed(sequence, chunk)])
    return sequence


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of the difference, in standard deviations of the logits."""
    return float(np.sqrt(((one - other) ** 2).mean()) / one.std())


def same(backend: Backend) -> float:
    """How far apart the logits of one state may lie: batch shapes choose the kernels, and llama.cpp's for
    four-bit weights round activations to eight bits in one and not in another."""
    if isinstance(backend, FakeBackend):
        return 0.0
    if isinstance(backend, TorchBackend | MLXBackend):
        return 1e-4
    return 0.002 if backend.info.vocabulary < 1000 else 0.1


def assert_same_logits(backend: Backend, one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype == np.float32
    assert one.shape == other.shape == (backend.info.vocabulary,)
    assert distance(one, other) <= same(backend)


def said(backend: Backend, sequence: int, n: int, params: SamplingParams = EM, seed: int = 1) -> list[int]:
    """n tokens drawn one after another; the sequence has just been fed."""
    uniforms, out = Uniforms(seed), []
    for t in range(n):
        out.append(backend.sample([Row(sequence, params, uniforms[t])])[0].token)
        backend.forward([Feed(sequence, out[-1:])])
    return out


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
        if isinstance(backend, FakeBackend):  # has none: it is text either way
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

    def test_sequences_share_the_context(self, backend) -> None:
        ids = (tokens(backend) * CONTEXT)[: CONTEXT // 2]
        one, other = read(backend, ids), read(backend, ids[:-2])
        with pytest.raises(ContextFullError):
            backend.forward([Feed(one, [5, 6]), Feed(other, [5])])
        assert (backend.length(one), backend.length(other)) == (len(ids), len(ids) - 2)
        backend.release(one)
        backend.forward([Feed(other, [5, 6, 7])])
        row = backend.logits(other)
        backend.release(other)
        assert_same_logits(backend, row, backend.logits(read(backend, [*ids[:-2], 5, 6, 7])))

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
        backend.forward([Feed(sequence, long)])  # and the flag of the last call is forgotten
        assert backend.length(sequence) == len(ids) + 200

    def test_an_unknown_sequence_leaves_the_others_usable(self, backend) -> None:
        ids = tokens(backend)
        sequence = read(backend, ids)
        with pytest.raises(KeyError):
            backend.forward([Feed(sequence, [5]), Feed(SEQUENCES - 1, [6])])
        if backend.length(sequence) == len(ids):
            backend.forward([Feed(sequence, [5])])
        assert_same_logits(backend, backend.logits(sequence), backend.logits(read(backend, [*ids, 5])))
