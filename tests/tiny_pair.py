"""The same small random model twice: a transformers folder, and the GGUF file that llama.cpp runs.

`write_pair(folder, "llama")` or "qwen2" writes both. The GGUF is made from the weights here, with Q's and K's
rows in llama.cpp's order for llama, by an index list. So emlocal's permutation is tested against another one.
The llama model has an output matrix; the qwen2 model shares it with the embeddings.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emlocal.models.adapters.adapter import Adapter, LoraPair
from tests.tiny_architectures import architecture_metadata
from tests.tiny_gguf import (
    EMBEDDING,
    FFN,
    HEADS,
    HEADS_KV,
    TOKENS,
    Tensor,
    build,
    tiny_metadata,
    u32,
)

LAYERS = 2
HEAD = EMBEDDING // HEADS
SHAPES = {
    "self_attn.q_proj": (EMBEDDING, EMBEDDING),
    "self_attn.k_proj": (HEADS_KV * HEAD, EMBEDDING),
    "self_attn.v_proj": (HEADS_KV * HEAD, EMBEDDING),
    "self_attn.o_proj": (EMBEDDING, EMBEDDING),
    "mlp.gate_proj": (FFN, EMBEDDING),
    "mlp.up_proj": (FFN, EMBEDDING),
    "mlp.down_proj": (EMBEDDING, FFN),
}
"""Shapes [out, in] of a layer's matrices."""
_GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class ModelPair:
    """The places of both models."""

    folder: Path
    gguf: Path


def write_pair(folder: Path, kind: str) -> ModelPair:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    config = config_class(
        vocab_size=len(TOKENS),
        hidden_size=EMBEDDING,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS_KV,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=kind == "qwen2",
    )
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0 if parameter.ndim == 2 else 1.0, 0.15)
    model.save_pretrained(folder / "hf")
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    metadata = tiny_metadata() if kind == "llama" else architecture_metadata(kind)
    metadata[f"{kind}.block_count"] = u32(LAYERS)
    tensors = [_tensor(name, w, kind) for name, w in weights.items()]
    path = folder / f"{kind}.gguf"
    path.write_bytes(build(metadata, [t for t in tensors if t is not None]))
    return ModelPair(folder / "hf", path)


def _tensor(name: str, w: np.ndarray, kind: str) -> Tensor | None:
    if kind == "qwen2" and name == "lm_head.weight":
        return None
    if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        half = HEAD // 2
        order = [h * HEAD + i + s * half for h in range(len(w) // HEAD) for i in range(half) for s in (0, 1)]
        w = w[order]
    return Tensor(gguf_name(name), w.shape[::-1], np.ascontiguousarray(w, "<f4").tobytes())


def gguf_name(name: str) -> str:
    """Returns GGUF's name for a parameter of transformers."""
    tops = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = name.rpartition(".")
    if stem in tops:
        return f"{tops[stem]}.{kind}"
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF[module]}.{kind}"


def random_adapter(
    *, rank: int = 4, scale: float = 2.0, mixed: bool = False, layers: int = LAYERS, seed: int = 1
) -> Adapter:
    """Makes a pair for each matrix of each layer; `mixed`: with various ranks and scales."""
    rng = np.random.default_rng(seed)
    pairs = {}
    for layer in range(layers):
        for i, (module, (out, inner)) in enumerate(SHAPES.items()):
            r = rank + i % 3 if mixed else rank
            a = rng.normal(0, 0.2, (r, inner)).astype(np.float32)
            b = rng.normal(0, 0.2, (out, r)).astype(np.float32)
            own = scale * (1, 0.5, 3)[(i + layer) % 3] if mixed else scale
            pairs[f"model.layers.{layer}.{module}"] = LoraPair(a, b, own)
    return Adapter(pairs, "tiny/base")


def assert_same(found: Adapter, wanted: Adapter, *, exactly: bool = True) -> None:
    """Asserts that the pairs are equal; not `exactly`: that scale · B A is, however it is written."""
    assert found.base_model == wanted.base_model
    assert found.pairs.keys() == wanted.pairs.keys()
    for name, pair in wanted.pairs.items():
        other = found.pairs[name]
        if exactly:
            assert other.scale == pair.scale
            assert np.array_equal(other.a, pair.a)
            assert np.array_equal(other.b, pair.b)
        wants = pair.scale * pair.b.astype("f8") @ pair.a
        means = other.scale * other.b.astype("f8") @ other.a
        assert np.abs(means - wants).max() <= 1e-6 * np.abs(wants).max(), name
