"""The tiny model as other architectures, with a byte-level BPE vocabulary as Qwen's models have one.

`write_tiny_architecture(path, "qwen3")` writes one that real llama.cpp loads: qwen2, qwen3, gemma3 or llama.
"""

from pathlib import Path

import numpy as np

from tests.tiny_gguf import (
    EMBEDDING,
    HEADS,
    HEADS_KV,
    TOKENS,
    Tensor,
    Value,
    boolean,
    build,
    ints,
    strings,
    text,
    tiny_metadata,
    tiny_tensors,
    u32,
)

ARCHITECTURES = ("qwen2", "qwen3", "gemma3", "llama")
HEAD = EMBEDDING // HEADS
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]


def byte_letters() -> list[str]:
    """GPT-2's letter for each of the 256 bytes: itself where it can be seen, else one from 256 on."""
    unseen = [b for b in range(256) if b not in PRINTABLE]
    return [chr(b) if b in PRINTABLE else chr(256 + unseen.index(b)) for b in range(256)]


BPE_WORDS = ["th", "he", "in", "the", "an"]
BPE_MERGES = ["t h", "h e", "i n", "th e", "a n"]
_FILLERS = [f"<|extra_{i}|>" for i in range(len(TOKENS) - 256 - len(BPE_WORDS) - 2)]
BPE_TOKENS = [*byte_letters(), *BPE_WORDS, *_FILLERS, "<|im_start|>", "<|im_end|>"]


def architecture_metadata(architecture: str) -> dict[str, Value]:
    """The tiny model's metadata, with this architecture's keys and the byte-level vocabulary."""
    metadata = {k.replace("llama.", f"{architecture}.", 1): v for k, v in tiny_metadata().items()}
    del metadata["tokenizer.ggml.scores"]
    metadata |= {
        "general.architecture": text(architecture),
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text("qwen2"),
        "tokenizer.ggml.tokens": strings(BPE_TOKENS),
        "tokenizer.ggml.token_type": ints([1] * 261 + [3] * (len(BPE_TOKENS) - 261)),
        "tokenizer.ggml.merges": strings(BPE_MERGES),
        "tokenizer.ggml.add_bos_token": boolean(0),
    }
    if architecture == "gemma3":
        for name, number in (("key_length", HEAD), ("value_length", HEAD), ("sliding_window", 16)):
            metadata[f"gemma3.attention.{name}"] = u32(number)
    return metadata


def architecture_tensors(architecture: str, seed: int = 0) -> list[Tensor]:
    """The tiny model's weights, with the vectors that this architecture has besides."""
    kv = HEAD * HEADS_KV
    more = {
        "qwen2": {"attn_q.bias": EMBEDDING, "attn_k.bias": kv, "attn_v.bias": kv},
        "qwen3": {"attn_q_norm.weight": HEAD, "attn_k_norm.weight": HEAD},
        "gemma3": {
            **{"attn_q_norm.weight": HEAD, "attn_k_norm.weight": HEAD},
            **{"post_attention_norm.weight": EMBEDDING, "post_ffw_norm.weight": EMBEDDING},
        },
        "llama": {},
    }[architecture]
    vectors = [Tensor(f"blk.0.{name}", (n,), np.ones(n, "<f4").tobytes()) for name, n in more.items()]
    return [*tiny_tensors(seed), *vectors]


def write_tiny_architecture(path: Path, architecture: str, *, seed: int = 0) -> Path:
    path.write_bytes(build(architecture_metadata(architecture), architecture_tensors(architecture, seed)))
    return path
