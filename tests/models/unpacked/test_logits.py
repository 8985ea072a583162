"""A GGUF model and its unpacked folder give the same logits, in llama.cpp and in transformers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from emlocal.backends.base import Feed, LoadOptions
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.models.unpacked import unpack
from tests.tiny_architectures import architecture_metadata, architecture_tensors
from tests.tiny_gguf import EMBEDDING, GGML_F16, HEADS, TOKENS, Tensor, Value, build, f32, text, u32

HEAD = EMBEDDING // HEADS
pytestmark = pytest.mark.usefixtures("no_flash_attention")
PROMPT = [int(t) for t in np.random.default_rng(1).integers(3, len(TOKENS), 150)]


def llama_cpp_logits(model: GGUFModel, tokens: list[int]) -> NDArray[np.float32]:
    backend = LlamaCppBackend(model, LoadOptions(context=256, kv_type="f32", sequences=1, threads=1))
    sequence = backend.open()
    backend.forward([Feed(sequence, tokens)])
    logits = backend.logits(sequence)
    backend.close()
    return logits


def transformers_logits(folder: Path, tokens: list[int]) -> NDArray[np.float32]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0, -1].numpy()
    return logits


def random_vectors(tensors: list[Tensor]) -> list[Tensor]:
    """Replaces norms and biases of one by random ones, so that a lost or swapped one shows."""
    rng = np.random.default_rng(2)
    return [
        Tensor(t.name, t.shape, rng.normal(0.8, 0.3, t.shape[0]).astype("<f4").tobytes())
        if len(t.shape) == 1
        else t
        for t in tensors
    ]


def write(path: Path, architecture: str, more: list[Tensor] | None = None, **metadata: Value) -> GGUFModel:
    kv = architecture_metadata(architecture)
    kv |= {f"{architecture}.{name.replace('__', '.')}": value for name, value in metadata.items()}
    path.write_bytes(build(kv, random_vectors(architecture_tensors(architecture)) + (more or [])))
    return resolve(str(path))


def assert_the_same(model: GGUFModel, within: float = 1e-4) -> None:
    folder = unpack(model)
    for length in (1, 2, len(PROMPT)):
        there, here = llama_cpp_logits(model, PROMPT[:length]), transformers_logits(folder, PROMPT[:length])
        assert np.abs(there).max() > 0.5
        np.testing.assert_allclose(here, there, atol=within, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_each_architecture(tmp_path: Path, architecture: str) -> None:
    assert_the_same(write(tmp_path / "tiny.gguf", architecture))


def test_an_output_matrix_of_its_own_and_biases(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    output = rng.normal(0, 0.3, (len(TOKENS), EMBEDDING)).astype("<f4")
    sizes = {"attn_q": EMBEDDING, "attn_k": 2 * HEAD, "attn_v": 2 * HEAD, "attn_output": EMBEDDING}
    sizes |= {"ffn_gate": 64, "ffn_up": 64, "ffn_down": EMBEDDING}
    biases = [
        Tensor(f"blk.0.{name}.bias", (n,), rng.normal(0, 0.5, n).astype("<f4").tobytes())
        for name, n in sizes.items()
    ]
    more = [Tensor("output.weight", (EMBEDDING, len(TOKENS)), output.tobytes()), *biases]
    assert_the_same(write(tmp_path / "tiny.gguf", "llama", more))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_positions(tmp_path: Path, architecture: str, kind: str) -> None:
    scaling: dict[str, Value] = {"rope__scaling__type": text(kind), "rope__scaling__factor": f32(4.0)}
    if kind == "yarn":
        scaling["rope__scaling__original_context_length"] = u32(64)
    assert_the_same(write(tmp_path / "tiny.gguf", architecture, **scaling))


def llama3_divisors(theta: float, factor: float) -> list[float]:
    """Follows the definition in transformers' modeling_rope_utils.py, written unlike emlocal's code."""
    out = []
    for i in range(HEAD // 2):
        frequency = theta ** (-2 * i / HEAD)
        turns = 8192 * frequency / (2 * math.pi)
        if turns > 4:
            out.append(1.0)
        elif turns < 1:
            out.append(factor)
        else:
            smooth = (turns - 1) / 3
            out.append(frequency / ((1 - smooth) * frequency / factor + smooth * frequency))
    return out


def test_llama_3s_positions(tmp_path: Path) -> None:
    divisors = llama3_divisors(10000.0, 8.0)
    assert len(set(divisors)) > 1
    assert max(divisors) < 8.0  # at this theta the last one is on the slope, so the factor cannot be read off
    for theta in (200_000.0, 500_000.0):
        divisors = llama3_divisors(theta, 8.0)
        more = [Tensor("rope_freqs.weight", (HEAD // 2,), np.array(divisors, "<f4").tobytes())]
        path = tmp_path / f"{theta:.0f}.gguf"
        kv = architecture_metadata("llama") | {"llama.rope.freq_base": f32(theta)}
        path.write_bytes(build(kv, architecture_tensors("llama") + more))
        assert_the_same(resolve(str(path)))


def test_half_precision_tensors_are_kept(tmp_path: Path) -> None:
    tensors = [
        Tensor(t.name, t.shape, np.frombuffer(t.data, "<f4").astype("<f2").tobytes(), GGML_F16)
        if len(t.shape) == 2
        else t
        for t in architecture_tensors("llama")
    ]
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build(architecture_metadata("llama"), tensors))
    model = resolve(str(path))
    there, here = llama_cpp_logits(model, PROMPT), transformers_logits(unpack(model), PROMPT)
    np.testing.assert_allclose(here, there, atol=0.02, rtol=0)  # llama.cpp rounds activations to F16


@pytest.mark.real
def test_smollm2_is_greedy_alike(smollm2: GGUFModel, unpacked_smollm2: Path) -> None:
    """llama.cpp rounds activations to 8 bits for quantized weights.

    It may choose the other of two near tokens.
    """
    backend = LlamaCppBackend(smollm2, LoadOptions(context=128, kv_type="f32", sequences=1))
    model = AutoModelForCausalLM.from_pretrained(unpacked_smollm2, dtype=torch.float32)
    tokens = backend.encode("The capital of France is", add_special=True, parse_special=False)
    sequence, feed, equal = backend.open(), tokens, 0
    for _ in range(16):
        backend.forward([Feed(sequence, feed)])
        there = backend.logits(sequence)
        with torch.inference_mode():
            here = model(torch.tensor([tokens])).logits[0, -1].numpy()
        assert np.corrcoef(here, there)[0, 1] > 0.99
        near = there.max() - np.sort(there)[-2] < 0.5
        equal += here.argmax() == there.argmax()
        assert near or here.argmax() == there.argmax()
        feed = [int(there.argmax())]
        tokens += feed
    backend.close()
    assert equal >= 13
