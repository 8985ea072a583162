"""The torch engine compared with transformers itself, and with llama.cpp."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import emlocal
from emlocal.backends.base import Backend, Feed, LoadOptions, Row
from emlocal.backends.engine import engine as record
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.backends.slots import Chunk, passes
from emlocal.backends.torch.backend import TorchBackend, open_folder
from emlocal.backends.torch.cache import Decoder, TorchCache, Window, attention_windows
from emlocal.backends.torch.model import (
    Place,
    check_architecture,
    choose_place,
    load_model,
    out_of_memory,
    trained_context,
)
from emlocal.errors import BackendError, CancelledError, ModelError, UsageError
from emlocal.models.folder import sampling_settings
from emlocal.models.memory import estimate, kv_bytes
from emlocal.models.resolve import GGUFModel
from emlocal.models.tokenizer import Tokenizer
from emlocal.sampling import SamplingParams

CPU = torch.device("cpu")
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 294,
    "max_position_embeddings": 256,
}
MODELS = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 7, "head_dim": 8},
    "qwen3": {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "final_logit_softcapping": 0.5,
    },
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.2},
}


def random_model(kind: str) -> torch.nn.Module:
    """Makes a tiny model of this architecture with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**TINY, **MODELS[kind]}, attn_implementation="sdpa")
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request: pytest.FixtureRequest, unpacked_tiny: Path) -> tuple[torch.nn.Module, TorchBackend]:
    """A model, and the engine on it."""
    model = random_model(request.param)
    tokenizer = Tokenizer(unpacked_tiny)
    with open_tiny(unpacked_tiny) as tiny:
        info = tiny.info
    options = LoadOptions(context=128, sequences=6, shared=False, threads=1)
    return model, TorchBackend(model, tokenizer, info, options, Place(CPU, torch.float32, "test"))


class open_tiny:  # noqa: N801
    """Opens the tiny model and closes it at the end."""

    def __init__(self, folder: Path, **options: object) -> None:
        load = LoadOptions(context=128, sequences=4, threads=1)
        self.backend = open_folder(folder, load, device="cpu", dtype="float32", **options)  # type: ignore[arg-type]

    def __enter__(self) -> TorchBackend:
        return self.backend

    def __exit__(self, *_: object) -> None:
        self.backend.close()


@torch.inference_mode()
def plainly(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Returns the last logits of transformers' own forward pass over the whole sequence."""
    return model(input_ids=torch.tensor([tokens])).logits[0, -1].float().numpy()


def test_every_state_is_what_transformers_computes(pair) -> None:
    """Compares ragged batches, forks, trims, gaps between slots and copies of far ones with full passes."""
    model, engine = pair
    rng = np.random.default_rng(1)
    held: dict[int, list[int]] = {}

    def feed(*parts: tuple[int, int]) -> None:
        feeds = [Feed(s, rng.integers(0, 294, n).tolist()) for s, n in parts]
        engine.forward(feeds)
        for sequence, tokens, _ in feeds:
            held[sequence] += tokens
            np.testing.assert_allclose(engine.logits(sequence), plainly(model, held[sequence]), atol=1e-4)

    for _ in range(6):
        held[engine.open()] = []
    feed((0, 9), (1, 12), (2, 1), (3, 30), (4, 2), (5, 3))
    feed((0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1))
    feed((5, 1), (0, 1))  # far apart: copied
    feed((1, 1), (3, 1), (4, 1))  # a gap: computed
    feed((2, 1), (0, 20), (5, 19), (3, 1))
    engine.trim(3, 8)
    del held[3][8:]
    feed((3, 3), (0, 4))
    engine.release(4)
    assert engine.fork(0) == 4
    held[4] = list(held[0])
    feed((4, 1), (0, 1))
    feed((3, 1), (4, 5), (1, 5))
    for sequence in list(held):
        engine.release(sequence)


def test_nothing_is_left_behind_a_length(unpacked_tiny) -> None:
    """Cells at and beyond a sequence's length are zero: a NaN there would reach attention through 0 · NaN."""
    with open_tiny(unpacked_tiny) as engine:
        cache = engine._decoder.cache
        one, other = engine.open(), engine.open()
        engine.forward([Feed(one, list(range(20))), Feed(other, [1, 2, 3])])
        engine.trim(one, 5)
        with pytest.raises(CancelledError):
            engine.forward([Feed(one, list(range(9)))], lambda: True)
        engine.release(other)
        for store in (*cache._keys, *cache._values):
            assert store[one, :, :5].any()
            assert not store[one, :, 5 : cache.capacity].any()
            assert not store[other, :, : cache.capacity].any()


def test_growing_keeps_what_is_held(unpacked_tiny) -> None:
    options = LoadOptions(context=256, sequences=2, threads=1)
    engine = open_folder(unpacked_tiny, options, device="cpu", dtype="float32")
    before = engine.memory_bytes()
    sequence = engine.open()
    for start in range(0, 250, 50):
        engine.forward([Feed(sequence, list(range(start, start + 50)))])
    got = engine.logits(sequence)
    engine.release(sequence)
    other = engine.open()
    engine.forward([Feed(other, list(range(250)))])
    np.testing.assert_allclose(engine.logits(other), got, atol=1e-4)
    assert engine.memory_bytes() > before
    engine.close()


def test_without_memory_to_grow_all_stays_as_it_was() -> None:
    """Memory for the keys is available (0.3 GB).

    Memory for the values (160 TB, beyond all addresses) is not.
    """
    cache = TorchCache()
    cache.reserve(1, 5, 256)
    cells = torch.arange(5)[None]
    window = Window(torch.tensor([[0]]), True, cells, (0, 5), 0, 5)
    states = torch.full((1, 1, 5, 1), 7, dtype=torch.uint8), torch.full((1, 1 << 16, 5, 1), 9.0).double()
    cache.begin(window, lambda: False)
    cache.update(*states, 0)
    before = cache.nbytes
    with pytest.raises(RuntimeError) as caught:
        cache.reserve(1_200_000, 256, 256)
    assert out_of_memory(caught.value)
    assert (cache.slots, cache.capacity, cache.nbytes) == (1, 256, before)
    cache.reserve(2, 5, 256)
    cache.copy(0, 1, 4)
    for store, value in ((cache._keys[0], 7), (cache._values[0], 9)):
        assert store.shape[0] == 2
        assert (store[0, :, :5] == value).all()
        assert (store[1, :, :4] == value).all()
        assert not store[0, :, 5:].any()
        assert not store[1, :, 4:].any()


def test_shared_room_grows_to_what_the_estimate_counts(tiny_model: GGUFModel, unpacked_tiny: Path) -> None:
    """With one long sequence beside short ones, torch holds as many cells for each."""
    options = LoadOptions(context=256, sequences=4, threads=1)
    engine = open_folder(unpacked_tiny, options, device="cpu", dtype="float32")
    for _ in range(4):
        engine.open()
    engine.forward([Feed(0, list(range(240)))])
    engine.forward([Feed(i, [5]) for i in range(4)])
    cells = kv_bytes(tiny_model.header, 256 * record("torch").contexts_to_reserve(4, shared=True), 4.0)
    assert cells < engine._decoder.cache.nbytes < 1.01 * cells
    terms = record("torch").memory_terms(tiny_model.header, None)
    assert engine.memory_bytes() < estimate(tiny_model.header, 256, terms, n_seqs=4)
    engine.close()


def test_passes_keep_to_the_budget_and_pad_little() -> None:
    feeds = [
        Feed(0, range(600)),
        *(Feed(i, [7]) for i in range(1, 16)),
        Feed(16, range(90)),
        Feed(17, range(80)),
    ]
    lengths = [3] * len(feeds)
    done: dict[int, int] = {}
    for chunks in passes(feeds, lengths, 256):
        width = max(len(chunk.tokens) for chunk in chunks)
        assert width * len(chunks) <= 256
        assert [chunk.slot for chunk in chunks] == sorted({chunk.slot for chunk in chunks})
        assert width * len(chunks) <= 1.25 * sum(len(chunk.tokens) for chunk in chunks)
        for chunk in chunks:
            assert chunk.start == 3 + done.get(chunk.slot, 0)
            done[chunk.slot] = done.get(chunk.slot, 0) + len(chunk.tokens)
            assert chunk.wanted == (done[chunk.slot] == len(feeds[chunk.slot].tokens))
    assert done == {feed.sequence: len(feed.tokens) for feed in feeds}
    assert len(list(passes(feeds, lengths, 256))) == 5  # 256, 256, 88 of the long one; 90 + 80; the steps


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 has an encoder and a decoder"),
        ({"model_type": "gemma3", "vision_config": {"a": 1}}, "gemma3 also takes pictures"),
        ({"model_type": "qwen3_next", "layer_types": ["linear_attention"]}, "layers of linear_attention"),
    ],
)
def test_other_architectures_are_refused(config, message) -> None:
    with pytest.raises(ModelError, match=message):
        check_architecture(config)


def test_a_model_without_keys_and_values_is_refused() -> None:
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=1, vocab_size=50, state_size=4)
    with pytest.raises((ModelError, TypeError, ValueError)):
        Decoder(AutoModelForCausalLM.from_config(config).eval(), CPU).check()


def test_weights_that_are_no_numbers_are_said() -> None:
    model = random_model("llama")
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = math.nan
    with pytest.raises(ModelError, match="LlamaForCausalLM's logits are not finite: its weights"):
        Decoder(model, CPU).check()


def test_windows_and_contexts_of_configurations() -> None:
    assert attention_windows({}) == {"full_attention": None}
    assert attention_windows({"sliding_window": 9}) == {"sliding_attention": 9}
    assert attention_windows({"sliding_window": 9, "use_sliding_window": False}) == {"full_attention": None}
    assert trained_context({"max_position_embeddings": 77}) == 77
    stretched = {"rope_type": "longrope", "original_max_position_embeddings": 40}
    assert trained_context({"max_position_embeddings": 77, "rope_parameters": stretched}) == 40
    with pytest.raises(ModelError, match="max_position_embeddings"):
        trained_context({"model_type": "llama"})


def test_folders_that_cannot_be_loaded(tmp_path, unpacked_tiny, capfd) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path, CPU, torch.float32)
    (tmp_path / "config.json").write_text((unpacked_tiny / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_model(tmp_path, CPU, torch.float32)
    assert "\n" not in caught.value.message
    raw = (unpacked_tiny / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path, CPU, torch.float32)
    layers = (
        (unpacked_tiny / "config.json").read_text().replace('num_hidden_layers": 1', 'num_hidden_layers": 2')
    )
    (tmp_path / "config.json").write_text(layers)
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(ModelError, match=r"has no weights for model\.layers\.1"):
        load_model(tmp_path, CPU, torch.float32)
    assert capfd.readouterr() == ("", "")


def test_a_model_with_more_rows_than_its_tokenizer_has_tokens(unpacked_tiny: Path, tmp_path: Path) -> None:
    """Vocabularies are padded to round numbers: a padding token can be drawn and fed, and has no text."""
    config = AutoConfig.for_model("llama", **{**TINY, "vocab_size": 320})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(unpacked_tiny / name, tmp_path)
    with emlocal.load(tmp_path, context=64, threads=1) as model:
        assert model.backend.info.vocabulary == 320
        assert [model.backend.token_bytes(t) for t in (293, 294, 319)][1:] == [b"", b""]
        answer = model.generate("the cat", raw=True, logit_bias={319: 99.0}, em=True, max_tokens=3)
        assert (answer.tokens, answer.text, answer.finish_reason) == ([319] * 3, "", "length")


def test_pickled_weights_are_not_read(tmp_path, unpacked_tiny) -> None:
    (tmp_path / "config.json").write_text((unpacked_tiny / "config.json").read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path, CPU, torch.float32)


def test_sampling_settings(tmp_path) -> None:
    assert sampling_settings(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": 2}')
    assert sampling_settings(tmp_path) == {"temperature": 0.7, "top_k": 20, "repeat_penalty": 1.1}


def test_options_that_it_cannot_do(unpacked_tiny) -> None:
    with pytest.raises(UsageError, match=r"--kv-type is q8_0.*float32"):
        open_folder(unpacked_tiny, LoadOptions(kv_type="q8_0"), device="cpu", dtype="float32")
    with pytest.raises(ModelError, match="no adapter a"):
        open_folder(unpacked_tiny, LoadOptions(adapters=((Path("a"), 1.0),)), device="cpu")
    for device in ("cuda:99", "nowhere", "meta"):
        with pytest.raises(UsageError):
            choose_place(device)
    with pytest.raises(UsageError, match="no format int3"):
        choose_place("cpu", "int3")


def test_describe_and_close(unpacked_tiny) -> None:
    with open_tiny(unpacked_tiny) as engine:
        assert engine.describe() == "context 128 tokens, cpu, float32 (asked for), 1 thread"
        for _ in range(4):
            engine.open()
        with pytest.raises(BackendError, match="all 4"):
            engine.open()


def test_a_gap_between_slots_is_computed_and_far_slots_are_not() -> None:
    decoder = Decoder(random_model("llama"), CPU)

    def rows(*slots: int, n: int = 1) -> list[int]:
        chunks = [Chunk(slot, 0, list(range(n)), True) for slot in slots]
        return [chunk.slot for chunk in decoder._with_gaps(chunks)]

    assert rows(0, 1, 2) == [0, 1, 2]
    assert rows(0, 2, 3) == [0, 1, 2, 3]
    assert rows(0, 5) == [0, 5]
    assert rows(0, 2, n=4) == [0, 2]


@pytest.mark.real
def test_it_says_what_llama_cpp_says(smollm2: GGUFModel, unpacked_smollm2: Path) -> None:
    """The weights are equal; llama.cpp rounds activations to eight bits, so the logits differ slightly."""
    options = LoadOptions(context=256, sequences=1, threads=1)
    ours: Backend = open_folder(unpacked_smollm2, options, device="cpu", dtype="float32")
    theirs: Backend = LlamaCppBackend(smollm2, options)
    distances = []
    for question in ("What is the capital of France?", "Name three colours.", "What is 2 + 2?"):
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        said = []
        for engine in (ours, theirs):
            tokens = engine.encode(prompt, add_special=True, parse_special=True)
            sequence = engine.open()
            engine.forward([Feed(sequence, tokens)])
            logits = [engine.logits(sequence)]
            out = []
            for _ in range(4):
                out.append(engine.sample([Row(sequence, SamplingParams(temperature=0), 0.5)])[0].token)
                engine.forward([Feed(sequence, out[-1:])])
            engine.release(sequence)
            said.append((tokens, out, logits[0]))
        assert said[0][0] == said[1][0]
        assert said[0][1] == said[1][1]
        p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for _, _, row in said)
        distances.append(float(abs(p - q).sum() / 2))
    assert max(distances) < 0.15
    assert not math.isnan(sum(distances))
    ours.close()
    theirs.close()
