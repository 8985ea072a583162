"""The tiny model as other architectures, with a byte-level BPE vocabulary like that of Qwen's models.

`write_tiny_architecture(path, "qwen3")` writes one that real llama.cpp loads; so does "mamba".
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.tiny_gguf import (
    EMBEDDING,
    FFN,
    HEADS,
    HEADS_KV,
    TOKENS,
    Tensor,
    Value,
    boolean,
    build,
    f32,
    ints,
    strings,
    text,
    tiny_metadata,
    tiny_tensors,
    u32,
)

ARCHITECTURES = (
    "qwen2",
    "qwen3",
    "gemma3",
    "llama",
    "gemma",
    "gemma2",
    "phi3",
    "qwen3moe",
    "mixtral",
    "deepseek2",
)
"""mixtral is llama with experts: its `general.architecture` is llama."""
HEAD = EMBEDDING // HEADS
EXPERTS, EXPERT_FFN = 4, 32
Q_RANK, KV_RANK, ROTATED, PLAIN = 8, 16, 4, 8
"""Sizes of deepseek2: ranks of the compressed Q and KV; the rotated and the other part of a head's key."""
CONV, STATE, INNER, STEP_RANK = 4, 16, 64, 2
"""Sizes of mamba."""
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


def byte_letters() -> list[str]:
    """Returns GPT-2's letter for each of the 256 bytes: itself if it is visible, else one from 256 on."""
    unseen = [b for b in range(256) if b not in PRINTABLE]
    return [chr(b) if b in PRINTABLE else chr(256 + unseen.index(b)) for b in range(256)]


BPE_WORDS = ["th", "he", "in", "the", "an"]
BPE_MERGES = ["t h", "h e", "i n", "th e", "a n"]
_FILLERS = [f"<|extra_{i}|>" for i in range(len(TOKENS) - 256 - len(BPE_WORDS) - 2)]
BPE_TOKENS = [*byte_letters(), *BPE_WORDS, *_FILLERS, "<|im_start|>", "<|im_end|>"]


def architecture_metadata(architecture: str) -> dict[str, Value]:
    """Returns the tiny model's metadata, with this architecture's keys and the byte-level vocabulary."""
    name = general_architecture(architecture)
    metadata = {k.replace("llama.", f"{name}.", 1): v for k, v in tiny_metadata().items()}
    del metadata["tokenizer.ggml.scores"]
    metadata |= {
        "general.architecture": text(name),
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text("qwen2"),
        "tokenizer.ggml.tokens": strings(BPE_TOKENS),
        "tokenizer.ggml.token_type": ints([1] * 261 + [3] * (len(BPE_TOKENS) - 261)),
        "tokenizer.ggml.merges": strings(BPE_MERGES),
        "tokenizer.ggml.add_bos_token": boolean(0),
    }
    for key, number in _NUMBERS.get(architecture, {}).items():
        metadata[f"{name}.{key}"] = f32(number) if isinstance(number, float) else u32(number)
    if architecture == "mamba":
        for key in ("attention.head_count_kv", "rope.dimension_count", "rope.freq_base"):
            del metadata[f"mamba.{key}"]
    return metadata


def general_architecture(architecture: str) -> str:
    """Returns the architecture's `general.architecture`."""
    return "llama" if architecture == "mixtral" else architecture


_HEADS = {"attention.key_length": HEAD, "attention.value_length": HEAD}
_EXPERTS = {"expert_count": EXPERTS, "expert_used_count": 2}
_NUMBERS: Mapping[str, Mapping[str, int | float]] = {
    "gemma": _HEADS,
    "gemma2": {
        **_HEADS,
        "attention.sliding_window": 16,
        "block_count": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {**_HEADS, "attention.sliding_window": 16},
    "phi3": {"rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.5},
    "qwen3moe": {**_HEADS, **_EXPERTS, "expert_feed_forward_length": EXPERT_FFN},
    "mixtral": _EXPERTS,
    "deepseek2": {
        **_EXPERTS,
        "block_count": 2,
        "leading_dense_block_count": 1,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": Q_RANK,
        "attention.kv_lora_rank": KV_RANK,
        "attention.key_length": KV_RANK + ROTATED,
        "attention.value_length": KV_RANK,
        "attention.key_length_mla": PLAIN + ROTATED,
        "attention.value_length_mla": PLAIN,
        "rope.dimension_count": ROTATED,
        "expert_feed_forward_length": EXPERT_FFN,
        "expert_shared_count": 1,
        "expert_weights_scale": 1.5,
        "rope.scaling.yarn_log_multiplier": 0.1,
    },
    "mamba": {
        "attention.head_count": 0,
        "feed_forward_length": 0,
        "ssm.conv_kernel": CONV,
        "ssm.inner_size": INNER,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": STEP_RANK,
    },
}


def architecture_tensors(architecture: str, seed: int = 0) -> list[Tensor]:
    """Returns the tiny model's weights, with this architecture's additions and replacements."""
    new = _new_tensors(architecture)
    tensors = [t for t in tiny_tensors(seed) if _kept(architecture, t.name)]
    rng = np.random.default_rng(seed + 1)
    for name, shape in new.items():
        size = int(np.prod(shape))
        data = np.ones(size) if len(shape) == 1 else rng.normal(0.0, 0.3, size)
        tensors.append(Tensor(f"blk.0.{name}", shape, data.astype("<f4").tobytes()))
    if architecture == "gemma2":
        tensors += [
            replace(t, name=t.name.replace("blk.0.", "blk.1.")) for t in tensors if "blk.0." in t.name
        ]
    if architecture == "deepseek2":  # one dense layer, and one with experts
        experts = [t for t in tensors if "exp" in t.name or "_inp" in t.name]
        both = [t for t in tensors if "attn" in t.name or "ffn_norm" in t.name]
        tensors = [t for t in tensors if t not in experts]
        tensors += [_in_the_next_layer(t) for t in (*both, *experts)]
    return tensors


def _in_the_next_layer(tensor: Tensor) -> Tensor:
    return replace(tensor, name=tensor.name.replace("blk.0.", "blk.1."))


def _kept(architecture: str, name: str) -> bool:
    if architecture == "mamba":
        return name.startswith(("token_embd", "output_norm")) or name.endswith("attn_norm.weight")
    gone: tuple[str, ...] = {
        "phi3": ("attn_q.", "attn_k.", "attn_v.", "ffn_up.", "ffn_gate."),
        "qwen3moe": ("ffn_up.", "ffn_gate.", "ffn_down."),
        "mixtral": ("ffn_up.", "ffn_gate.", "ffn_down."),
        "deepseek2": ("attn_q.", "attn_k.", "attn_v.", "attn_output."),
    }.get(architecture, ())
    return not any(part in name for part in gone)


def _new_tensors(architecture: str) -> dict[str, tuple[int, ...]]:
    """Returns the extra tensors of one layer: shapes in GGUF order."""
    kv = HEAD * HEADS_KV
    norms = {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
    after = {"post_attention_norm.weight": (EMBEDDING,), "post_ffw_norm.weight": (EMBEDDING,)}
    wide = FFN if architecture == "mixtral" else EXPERT_FFN
    experts = {
        "ffn_gate_inp.weight": (EMBEDDING, EXPERTS),
        "ffn_gate_exps.weight": (EMBEDDING, wide, EXPERTS),
        "ffn_up_exps.weight": (EMBEDDING, wide, EXPERTS),
        "ffn_down_exps.weight": (wide, EMBEDDING, EXPERTS),
    }
    of: dict[str, dict[str, tuple[int, ...]]] = {
        "qwen2": {"attn_q.bias": (EMBEDDING,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)},
        "qwen3": norms,
        "gemma2": after,
        "gemma3": norms | after,
        "phi3": {
            "attn_qkv.weight": (EMBEDDING, EMBEDDING + 2 * kv),
            "ffn_up.weight": (EMBEDDING, 2 * FFN),
        },
        "qwen3moe": norms | experts,
        "mixtral": experts,
        "deepseek2": {
            "attn_q_a.weight": (EMBEDDING, Q_RANK),
            "attn_q_a_norm.weight": (Q_RANK,),
            "attn_q_b.weight": (Q_RANK, HEADS * (PLAIN + ROTATED)),
            "attn_kv_a_mqa.weight": (EMBEDDING, KV_RANK + ROTATED),
            "attn_kv_a_norm.weight": (KV_RANK,),
            "attn_k_b.weight": (PLAIN, KV_RANK, HEADS),
            "attn_v_b.weight": (KV_RANK, PLAIN, HEADS),
            "attn_output.weight": (HEADS * PLAIN, EMBEDDING),
            "ffn_gate_shexp.weight": (EMBEDDING, EXPERT_FFN),
            "ffn_up_shexp.weight": (EMBEDDING, EXPERT_FFN),
            "ffn_down_shexp.weight": (EXPERT_FFN, EMBEDDING),
            "exp_probs_b.bias": (EXPERTS,),
            **experts,
        },
        "mamba": {
            "ssm_in.weight": (EMBEDDING, 2 * INNER),
            "ssm_conv1d.weight": (CONV, INNER),
            "ssm_conv1d.bias": (INNER,),
            "ssm_x.weight": (INNER, STEP_RANK + 2 * STATE),
            "ssm_dt.weight": (STEP_RANK, INNER),
            "ssm_dt.bias": (INNER,),
            "ssm_a": (STATE, INNER),
            "ssm_d": (INNER,),
            "ssm_out.weight": (INNER, EMBEDDING),
        },
    }
    return of.get(architecture, {})


def write_tiny_architecture(path: Path, architecture: str, *, seed: int = 0) -> Path:
    path.write_bytes(build(architecture_metadata(architecture), architecture_tensors(architecture, seed)))
    return path
