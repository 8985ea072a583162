"""The MLX engine compared with mlx-lm, transformers and the torch engine."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model as load_with_mlx_lm
from mlx_lm.utils import quantize_model, save_model
from transformers import AutoConfig, AutoModelForCausalLM

from emlocal.backends.base import Backend, Feed, LoadOptions, Row
from emlocal.backends.mlx.backend import MLXBackend, open_folder
from emlocal.backends.mlx.cache import Decoder, MLXCache
from emlocal.backends.mlx.model import check_config, choose_place, context_of, old_names, windows
from emlocal.backends.torch.backend import open_folder as open_in_torch
from emlocal.errors import CancelledError, ModelError, UsageError
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.models.adapters.folders import write_mlx, write_peft
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.folder import read_folder_header
from emlocal.sampling import SamplingParams, Uniforms
from tests.backends.contract import EM

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 294,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
MODELS = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "num_hidden_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    },
    "granite": {"logits_scaling": 3.0},
}
OPTIONS = LoadOptions(context=128, sequences=6, shared=False)


@pytest.fixture(scope="module", params=list(MODELS))
def pair(
    request: pytest.FixtureRequest, unpacked_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, MLXBackend]:
    """A tiny model with random weights in transformers, and the engine on its saved folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **{**TINY, **MODELS[request.param]})
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(unpacked_tiny / name, folder)
    return model, open_folder(folder, OPTIONS, device="cpu")


@torch.inference_mode()
def plainly(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Returns the last logits of transformers' own forward pass over the whole sequence."""
    return model(input_ids=torch.tensor([tokens])).logits[0, -1].float().numpy()


def test_every_state_is_what_transformers_computes(pair) -> None:
    """Compares ragged batches, forks, trims, near and far gaps between slots with full passes."""
    model, engine = pair
    # mlx-lm rounds Gemma's factor of the embeddings to bfloat16
    near = 1e-3 if engine.info.architecture == "gemma3_text" else 1e-4
    rng = np.random.default_rng(1)
    held: dict[int, list[int]] = {}

    def feed(*parts: tuple[int, int]) -> None:
        feeds = [Feed(s, rng.integers(0, 294, n).tolist()) for s, n in parts]
        engine.forward(feeds)
        for sequence, tokens, _ in feeds:
            held[sequence] += tokens
            np.testing.assert_allclose(engine.logits(sequence), plainly(model, held[sequence]), atol=near)

    for _ in range(6):
        held[engine.open()] = []
    feed((0, 9), (1, 12), (2, 1), (3, 30), (4, 2), (5, 3))
    feed((0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1))
    feed((5, 1), (0, 1))
    feed((1, 1), (3, 1), (4, 1))
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


def last_logits(engine: Backend, tokens: list[int]) -> np.ndarray:
    sequence = engine.open()
    engine.forward([Feed(sequence, tokens)])
    logits = engine.logits(sequence)
    engine.release(sequence)
    return logits


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), EM])
def test_text_and_logits_are_those_of_torch(unpacked_tiny, params) -> None:
    options = LoadOptions(context=128, sequences=1, threads=1)
    engines = [
        open_folder(unpacked_tiny, options, device="cpu"),
        open_in_torch(unpacked_tiny, options, device="cpu", dtype="float32"),
    ]
    said: list[list[int]] = []
    uniforms = Uniforms(3)
    rows: list[np.ndarray] = []
    for engine in engines:
        sequence, out = engine.open(), []
        engine.forward([Feed(sequence, [1, 40, 41, 42])])
        for _ in range(40):
            rows.append(engine.logits(sequence))
            out.append(engine.sample([Row(sequence, params, uniforms[len(out)])])[0].token)
            engine.forward([Feed(sequence, out[-1:])])
        said.append(out)
        engine.close()
    assert said[0] == said[1]
    np.testing.assert_allclose(rows[:40], rows[40:], atol=1e-4)


def random_adapter(folder: Path) -> Adapter:
    """Makes an adapter for two layers of the tiny model, with different scales."""
    rng = np.random.default_rng(5)
    shapes = {name: t.shape for name, t in read_folder_header(folder).tensors.items()}
    pairs = {}
    for name, scale in (("model.layers.0.self_attn.q_proj", 2.0), ("model.layers.0.mlp.down_proj", 0.5)):
        rows, columns = shapes[f"{name}.weight"]
        a, b = rng.normal(size=(4, columns)), rng.normal(size=(rows, 4))
        pairs[name] = LoraPair(a.astype(np.float32) / 8, b.astype(np.float32) / 8, scale)
    return Adapter(pairs)


def test_adapters_of_all_formats_compute_what_torch_computes(tmp_path, tiny_model, unpacked_tiny) -> None:
    adapter = random_adapter(unpacked_tiny)
    write_peft(adapter, tmp_path / "peft")
    write_mlx(adapter, tmp_path / "mlx")
    write_gguf(adapter, tmp_path / "a.gguf", tiny_model.header)
    tokens = [1, 40, 41, 42, 43]

    def run(open_: object, *adapters: tuple[Path, float]) -> np.ndarray:
        options = LoadOptions(context=64, sequences=1, threads=1, adapters=adapters)
        engine = open_(unpacked_tiny, options, base=tiny_model.header, device="cpu", dtype="float32")  # type: ignore[operator]
        logits = last_logits(engine, tokens)
        engine.close()
        return logits

    plain = run(open_folder)
    for adapters in (
        [(tmp_path / "peft", 1.0)],
        [(tmp_path / "mlx", 0.5)],
        [(tmp_path / "a.gguf", 1.0)],
        [(tmp_path / "peft", 1.0), (tmp_path / "a.gguf", -0.5)],
    ):
        got = run(open_folder, *adapters)
        np.testing.assert_allclose(got, run(open_in_torch, *adapters), atol=1e-4)
        assert np.abs(got - plain).max() > 0.01


def test_adapters_that_do_not_fit_are_refused(tmp_path, unpacked_tiny) -> None:
    good = random_adapter(unpacked_tiny).pairs["model.layers.0.self_attn.q_proj"]
    for name, pair, message in (
        ("model.layers.7.self_attn.q_proj", good, "model.layers.7"),
        ("model.layers.0.mlp.up_proj", LoraPair(good.a[:, :5].copy(), good.b, 1.0), "does not fit tiny"),
    ):
        folder = tmp_path / name
        write_peft(Adapter({name: pair}), folder)
        with pytest.raises(ModelError, match=message):
            open_folder(unpacked_tiny, LoadOptions(adapters=((folder, 1.0),)), name="tiny", device="cpu")


def test_quantized_models_run_as_mlx_lm_runs_them_with_adapters_too(tmp_path, unpacked_tiny) -> None:
    model, config = load_with_mlx_lm(unpacked_tiny)
    model, config = quantize_model(model, config, group_size=32, bits=4)
    save_model(tmp_path, model)
    config["quantization"] = {"group_size": 32, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(unpacked_tiny / name, tmp_path)
    assert read_folder_header(tmp_path).parameters == read_folder_header(unpacked_tiny).parameters
    engine = open_folder(tmp_path, LoadOptions(context=64, sequences=2), device="cpu")
    tokens = [1, 40, 41, 42, 43]
    reference, _ = load_with_mlx_lm(tmp_path)
    reference.set_dtype(mx.float32)
    expected = np.array(reference(mx.array([tokens]))[0, -1].astype(mx.float32))
    np.testing.assert_allclose(last_logits(engine, tokens), expected, atol=1e-4)
    write_peft(random_adapter(unpacked_tiny), tmp_path / "peft")
    options = LoadOptions(context=64, sequences=2, adapters=((tmp_path / "peft", 1.0),))
    adapted = open_folder(tmp_path, options, device="cpu")
    assert np.abs(last_logits(adapted, tokens) - expected).max() > 0.01


def test_nothing_is_left_behind_a_length(unpacked_tiny) -> None:
    """Cells at and beyond a sequence's length are zero: a NaN there would reach attention through 0 · NaN."""
    engine = open_folder(unpacked_tiny, LoadOptions(context=128, sequences=4), device="cpu")
    cache = engine._decoder.cache
    one, other = engine.open(), engine.open()
    engine.forward([Feed(one, list(range(20))), Feed(other, [1, 2, 3])])
    engine.trim(one, 5)
    with pytest.raises(CancelledError):
        engine.forward([Feed(one, list(range(9)))], lambda: True)
    engine.release(other)
    assert len(cache.arrays) == 2
    for store in map(np.array, cache.arrays):
        assert store[one, :, :5].any()
        assert not store[one, :, 5 : cache.capacity].any()
        assert not store[other, :, : cache.capacity].any()


def test_growing_keeps_what_is_held(unpacked_tiny) -> None:
    engine = open_folder(unpacked_tiny, LoadOptions(context=256, sequences=2), device="cpu")
    before = engine.memory_bytes()
    sequence = engine.open()
    tokens = [i % 290 for i in range(250)]
    for start in range(0, 250, 50):
        engine.forward([Feed(sequence, tokens[start : start + 50])])
    got = engine.logits(sequence)
    engine.release(sequence)
    np.testing.assert_allclose(last_logits(engine, tokens), got, atol=1e-4)
    assert engine.memory_bytes() > before


def test_other_models_are_refused() -> None:
    from mlx_lm.models import mamba

    args = mamba.ModelArgs.from_dict(
        {
            "model_type": "mamba",
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 64,
            "state_size": 4,
            "num_hidden_layers": 1,
            "conv_kernel": 4,
            "use_bias": False,
            "use_conv_bias": True,
            "time_step_rank": 2,
        }
    )
    with pytest.raises(ModelError, match="mamba keeps a ArraysCache"):
        Decoder(mamba.Model(args))
    with pytest.raises(ModelError, match=r"needs code from its folder \(evil\.py\)"):
        check_config({"model_type": "llama", "model_file": "evil.py"})
    with pytest.raises(ModelError, match="t5 has an encoder and a decoder"):
        check_config({"model_type": "t5", "is_encoder_decoder": True})


def test_a_model_that_computes_otherwise_is_refused(unpacked_tiny) -> None:
    """Refuses a model whose cached steps do not give the logits of a full pass."""
    model, _ = load_with_mlx_lm(unpacked_tiny)
    decoder = Decoder(model)
    decoder.check()
    decoder.cache = MLXCache([1])  # each step sees only itself
    with pytest.raises(ModelError, match="token by token its logits are off"):
        decoder.check()
    assert windows(model) == [None]


def test_names_of_transformers_5_and_contexts(unpacked_tiny, tmp_path) -> None:
    assert old_names({}) == {}
    flat = {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}
    assert old_names({"rope_parameters": flat}) == {"rope_theta": 9.0, "rope_scaling": flat}
    assert old_names({"rope_parameters": flat, "rope_theta": 7.0, "rope_scaling": {}}) == {}
    kinds = {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 3.0}}
    assert old_names({"rope_parameters": kinds}) == {"rope_theta": 5.0, "rope_local_base_freq": 3.0}
    for name in unpacked_tiny.iterdir():
        shutil.copy(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for more, length in (
        ({}, 256),
        ({"sliding_window": 99}, 99),
        ({"sliding_window": 99, "use_sliding_window": False}, 256),
        ({"rope_parameters": {"rope_type": "dynamic", "original_max_position_embeddings": 44}}, 44),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        assert context_of(read_folder_header(tmp_path), [None]) == length
    assert context_of(read_folder_header(tmp_path), [44, None]) == 44


def test_folders_that_cannot_be_loaded(tmp_path, unpacked_tiny, capfd) -> None:
    for name in unpacked_tiny.iterdir():
        shutil.copy(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for more, message in (
        ({"num_hidden_layers": 2}, "cannot be loaded with mlx-lm"),
        ({"model_type": "nosuch"}, "nosuch not supported"),
        ({"model_file": "evil.py"}, "never runs"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more}))
        with pytest.raises(ModelError, match=message) as caught:
            open_folder(tmp_path, LoadOptions(), device="cpu")
        assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_options_that_it_cannot_do(unpacked_tiny) -> None:
    with pytest.raises(UsageError, match=r"--kv-type is q8_0.*float32"):
        open_folder(unpacked_tiny, LoadOptions(kv_type="q8_0"), device="cpu")
    with pytest.raises(ModelError, match="no adapter a"):
        open_folder(unpacked_tiny, LoadOptions(adapters=((Path("a"), 1.0),)), device="cpu")
    with pytest.raises(UsageError, match="no device tpu"):
        choose_place({}, "tpu")
    with pytest.raises(UsageError, match="no format int3"):
        choose_place({}, "cpu", "int3")
    engine = open_folder(unpacked_tiny, LoadOptions(context=128), device="cpu")
    assert engine.describe() == "context 128 tokens, cpu, float32 (asked for)"


BEGINNINGS = [
    *("The capital of France is", "Water boils at", "Two plus two is", "The sky is", "My name is"),
    *("Once upon a time", "def add(a, b):", "Dear Sir or", "1, 2, 3, 4,", "The opposite of hot"),
    *("La vie est", "Roses are red,", "To be or not", "The largest planet", "Hello, how are"),
    *("Question: Why?", "x = [1,", "She opened the", "In the year", "Thank you"),
]


@pytest.mark.real
def test_it_says_what_mlx_lm_says(unpacked_smollm2: Path) -> None:
    """Compares greedy tokens after twenty prompts, read as one ragged batch here and one by one there."""
    options = LoadOptions(context=32, sequences=len(BEGINNINGS), shared=False)
    engine = open_folder(unpacked_smollm2, options, device="cpu")
    prompts = [engine.encode(text, add_special=True, parse_special=False) for text in BEGINNINGS]
    feeds = [Feed(engine.open(), prompt) for prompt in prompts]
    said: list[list[int]] = [[] for _ in feeds]
    for _ in range(3):
        engine.forward(feeds)
        rows = [Row(feed.sequence, SamplingParams(temperature=0), 0.5) for feed in feeds]
        tokens = [draw.token for draw in engine.sample(rows)]
        feeds = [Feed(row.sequence, [token]) for row, token in zip(rows, tokens, strict=True)]
        for out, token in zip(said, tokens, strict=True):
            out.append(token)
    engine.close()
    reference, _ = load_with_mlx_lm(unpacked_smollm2)
    reference.set_dtype(mx.float32)
    steps = [generate_step(mx.array(prompt), reference, max_tokens=3) for prompt in prompts]
    assert said == [[int(token) for token, _ in step] for step in steps]
