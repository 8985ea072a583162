"""llama.cpp on real models: compared with llama-cpp-python's own generation, and with long prompts."""

from collections.abc import Iterator

import llama_cpp
import numpy as np
import pytest

from emlocal.backends.base import Feed, LoadOptions, Row
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.em.steps import EMInf
from emlocal.errors import CancelledError, ContextFullError, ModelError, UsageError
from emlocal.generation import Completion, Job, Request, Scheduler
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.models.templates import render
from emlocal.sampling import SamplingParams, Uniforms
from tests.tiny_gguf import u32, write_tiny_gguf

GREEDY = SamplingParams(temperature=0)
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "1, 2, 3, 4,"]


@pytest.fixture(scope="module")
def smollm(smollm2: GGUFModel) -> Iterator[LlamaCppBackend]:
    backend = LlamaCppBackend(smollm2, LoadOptions(context=512, sequences=4, threads=1))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppBackend]:
    """The tiny model with room for prompts of several batches."""
    path = tmp_path_factory.mktemp("long") / "tiny.gguf"
    write_tiny_gguf(path, llama__context_length=u32(4096))
    backend = LlamaCppBackend(resolve(str(path)), LoadOptions(context=2048, sequences=4, threads=1))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def long(backend: LlamaCppBackend) -> list[int]:
    """Returns a prompt of more than two batches whose parts all differ."""
    return np.random.default_rng(0).integers(3, 290, 1300).tolist()


@pytest.fixture
def sequence(backend: LlamaCppBackend) -> Iterator[int]:
    sequence = backend.open()
    yield sequence
    backend.release(sequence)


def complete(
    backend: LlamaCppBackend, prompt: list[int], n: int, params: SamplingParams = GREEDY, seed: int = 0
) -> Completion:
    with Scheduler(backend, 1) as runner:
        *_, last = runner.follow([Job(prompt, [Request(params, Uniforms(seed), n)], at_once=True)])
    return last.handle.result()[0]


@pytest.mark.real
def test_greedy_is_llama_cpp_pythons_greedy(smollm: LlamaCppBackend, smollm2: GGUFModel) -> None:
    theirs = llama_cpp.Llama(
        str(smollm2.path), n_ctx=512, n_threads=1, verbose=False, flash_attn=True, logits_all=False
    )
    for prompt in PROMPTS:
        ids = smollm.encode(prompt, add_special=True, parse_special=True)
        assert ids == theirs.tokenize(prompt.encode(), add_bos=True, special=True)
        expected = theirs.create_completion(prompt, max_tokens=24, temperature=0)["choices"][0]["text"]
        assert complete(smollm, ids, 24).text == expected
        assert len(expected) > 20


@pytest.mark.real
def test_a_chat_turn_ends_by_itself(smollm: LlamaCppBackend) -> None:
    text = render(smollm.info.chat_template or "", [{"role": "user", "content": "Say hello."}])
    completion = complete(smollm, smollm.encode(text, add_special=False, parse_special=True), 100)
    assert completion.finish_reason == "stop"
    assert completion.stop is None
    assert "hello" in completion.text.lower()
    assert completion.draws[-1].token in smollm.info.end_tokens
    assert not set(completion.tokens) & smollm.info.end_tokens


def test_prompts_longer_than_a_batch(backend, sequence, long) -> None:
    backend.forward([Feed(sequence, long)])
    whole = backend.logits(sequence)
    backend.trim(sequence, 0)
    for start in range(0, len(long), 100):
        backend.forward([Feed(sequence, long[start : start + 100])])
    np.testing.assert_allclose(backend.logits(sequence), whole, atol=0.02 * whole.std())


def test_a_row_read_in_an_early_batch_outlives_the_later_ones(backend, sequence, long) -> None:
    """The first feed is complete after one batch, the second needs two more: both rows must be right."""
    other = backend.open()
    try:
        backend.forward([Feed(sequence, long[:400]), Feed(other, long[:900])])
        short, tall = backend.logits(sequence), backend.logits(other)
        draws = backend.sample([Row(sequence, GREEDY, 0), Row(other, GREEDY, 0)])
        assert [d.token for d in draws] == [short.argmax(), tall.argmax()]
        for s, n, row in ((sequence, 400, short), (other, 900, tall)):
            backend.trim(s, 0)
            backend.forward([Feed(s, long[:n])])
            np.testing.assert_allclose(backend.logits(s), row, atol=0.02 * row.std())
    finally:
        backend.release(other)


def test_cancelling_a_long_prompt_is_heeded_at_once_and_leaves_the_state(backend, sequence, long) -> None:
    head = long[:20]
    backend.forward([Feed(sequence, head)])
    before = backend.logits(sequence)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > limit

    for limit in (0, 1, 10, 50):  # in the first batch, in the middle of it, in a later one
        asked = 0
        with pytest.raises(CancelledError):
            backend.forward([Feed(sequence, long)], cancelled)
        assert asked <= limit + 3
        assert backend.length(sequence) == 20
    backend.trim(sequence, 19)
    backend.forward([Feed(sequence, head[-1:])])
    np.testing.assert_allclose(backend.logits(sequence), before, atol=0.02 * before.std())
    limit, asked = 10**9, 0
    backend.forward([Feed(sequence, long)], cancelled)
    assert backend.length(sequence) == 1320
    assert asked > 53  # otherwise the last limit above tests nothing


def test_overflow_in_a_later_batch_undoes_the_earlier_ones(backend, sequence, long) -> None:
    other = backend.open()
    try:
        backend.forward([Feed(other, long)])
        backend.forward([Feed(sequence, long[:30])])
        before = backend.logits(sequence)
        with pytest.raises(ContextFullError):  # 1,300 + 30 + 1,300 > 2,048
            backend.forward([Feed(sequence, long)])
        assert backend.length(sequence) == 30
        backend.trim(sequence, 29)
        backend.forward([Feed(sequence, long[29:30])])
        np.testing.assert_allclose(backend.logits(sequence), before, atol=0.02 * before.std())
        backend.forward([Feed(sequence, long[:600])])  # the undone room is free again
    finally:
        backend.release(other)


def test_forks_share_the_memory_of_their_prefix(backend, sequence, long) -> None:
    backend.forward([Feed(sequence, long)])
    forks = [backend.fork(sequence) for _ in range(3)]
    try:
        backend.forward([Feed(f, long[i : i + 100]) for i, f in enumerate(forks)])
        assert sum(map(backend.length, [sequence, *forks])) > 2 * backend.context
    finally:
        for fork in forks:
            backend.release(fork)


@pytest.mark.real
def test_em_on_a_real_model_changes_draws_and_never_the_top(smollm) -> None:
    prompt = smollm.encode("Once upon a time there was", add_special=True, parse_special=True)
    params = SamplingParams(em=EMInf(), temperature=1.0, min_p=0.0)
    completion = complete(smollm, prompt, 40, params, 5)
    stepped = [d for d in completion.draws if d.steps]
    assert len(stepped) > 10
    assert all(d.entropy_after < d.entropy_before for d in stepped)
    assert all(d.entropy_before <= 0.3 + 1e-5 for d in completion.draws if not d.steps)
    assert any(d.token != d.token_without_em for d in stepped)


@pytest.mark.real
def test_small_contexts(smollm2: GGUFModel) -> None:
    """llama_decode aborts the process if a batch exceeds n_batch, which is at most the context."""
    backend = LlamaCppBackend(smollm2, LoadOptions(context=64, sequences=2, threads=1))
    sequence = backend.open()
    ids = backend.encode("a b c d " * 60, add_special=True, parse_special=True)
    for n in (65, 100, len(ids)):
        with pytest.raises(ContextFullError, match="64"):
            backend.forward([Feed(sequence, ids[:n])])
    backend.forward([Feed(sequence, ids[:64])])
    assert backend.length(sequence) == 64
    backend.close()


def test_contexts_beyond_training_are_refused(tiny_model: GGUFModel) -> None:
    with pytest.raises(UsageError, match=r"--context 300 .* 256"):
        LlamaCppBackend(tiny_model, LoadOptions(context=300))


def test_the_default_context_is_the_models_own(tiny_model: GGUFModel) -> None:
    backend = LlamaCppBackend(tiny_model)
    assert backend.context == 256
    assert backend.threads >= 1
    backend.close()


def test_tokens_the_model_does_not_have(tiny_model: GGUFModel) -> None:
    backend = LlamaCppBackend(tiny_model)
    sequence = backend.open()
    backend.forward([Feed(sequence, [1, 5])])
    before = backend.logits(sequence)
    for bad in (backend.info.vocabulary, -1):
        with pytest.raises(ValueError, match="there is no token"):
            backend.forward([Feed(sequence, [5, bad])])
        assert backend.length(sequence) == 2
    with pytest.raises(ValueError, match="there is no token"):
        backend.forward([Feed(sequence, [2**40])])
    backend.trim(sequence, 1)
    backend.forward([Feed(sequence, [5])])
    np.testing.assert_allclose(backend.logits(sequence), before, atol=1e-3)
    backend.close()


@pytest.mark.real
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_kv_types(smollm2: GGUFModel, kv_type) -> None:
    backend = LlamaCppBackend(smollm2, LoadOptions(context=128, threads=1, kv_type=kv_type))
    sequence = backend.open()
    ids = backend.encode("The capital of France is", add_special=True, parse_special=True)
    backend.forward([Feed(sequence, ids)])
    token = backend.sample([Row(sequence, GREEDY, 0)])[0].token
    assert backend.token_bytes(token) == b" Paris"
    backend.close()


@pytest.mark.real
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_memory_counts_the_whole_kv_cache(smollm2: GGUFModel, kv_type) -> None:
    """llama.cpp reports the size of a saved state, which has all cells in use: here all of them."""
    backend = LlamaCppBackend(smollm2, LoadOptions(context=256, sequences=1, threads=1, kv_type=kv_type))
    empty = backend.memory_bytes()
    backend.forward([Feed(backend.open(), [5] * 256)])
    assert backend.memory_bytes() == empty
    state = backend._lib.llama_state_get_size(backend._context)
    cache = empty - backend._lib.llama_model_size(backend._model)
    assert cache == pytest.approx(state, rel=0.01)
    backend.close()


def test_a_missing_model_is_one_line(tmp_path) -> None:
    with pytest.raises((ModelError, UsageError)) as caught:
        LlamaCppBackend(resolve(str(tmp_path / "none.gguf")))
    assert "\n" not in caught.value.message
