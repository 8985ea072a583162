"""Layers by the names of transformers and of GGUF, and the order of Q's and K's rows in each.

llama.cpp rotates neighbouring pairs of a head's values in models of the Llama family, transformers a value
and the one half a head further on. So llama.cpp's converter reorders the rows of Q and K for that family,
and an adapter's B has to follow. Sources: conversion/llama.py (`undo_permute`) and llama_model_rope_type of
llama.cpp. An architecture that is in neither set below is refused: a guess would be garbage that loads.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from emlocal.errors import ModelError
from emlocal.models.gguf.header import GGUFHeader, shown

PERMUTED = frozenset({"llama", "arcee", "granite", "mistral3", "smollm3"})
"""Architectures of LlamaModel's subclasses in the converter that do not set `undo_permute = False`."""
UNPERMUTED = frozenset({"qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3"})
"""Architectures with LLAMA_ROPE_TYPE_NEOX whose matrices the converter passes through."""

_SEPARATE = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")  # phi3


def check_architecture(architecture: str) -> None:
    """Raise ModelError unless emlocal knows how this architecture's matrices lie in GGUF."""
    if architecture not in PERMUTED | UNPERMUTED:
        raise _unknown(architecture)


def _unknown(architecture: str) -> ModelError:
    known = ", ".join(sorted(PERMUTED | UNPERMUTED))
    return ModelError(
        f"emlocal cannot translate adapters to or from GGUF for the architecture {shown(architecture)}",
        f"known are {known}; for others use llama.cpp's convert_lora_to_gguf.py",
    )


@cache  # 10 ms and more, and training writes an adapter at each step
def gguf_names(architecture: str, layers: int) -> Mapping[str, str]:
    """GGUF's name of each linear layer by transformers' name: "blk.0.attn_q.weight".

    Raises ModelError for an architecture that is not known.
    """
    check_architecture(architecture)
    import gguf  # 0.1 s

    arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:  # an older gguf package
        raise _unknown(architecture)
    table = gguf.get_tensor_name_map(arch, layers)
    modules = _FUSED if architecture == "phi3" else _SEPARATE
    names = [f"model.layers.{i}.{module}" for i in range(layers) for module in modules]
    found = {name: table.get_name(name) for name in (*names, "lm_head")}
    return MappingProxyType({name: f"{there}.weight" for name, there in found.items() if there is not None})


def linear_shapes(base: GGUFHeader) -> dict[str, tuple[int, int]]:
    """[out, in] of each linear layer that a GGUF model has, by transformers' name."""
    there = base.tensors
    names = gguf_names(base.architecture, base.block_count)
    found = {name: there[stored].shape for name, stored in names.items() if stored in there}
    return {name: (shape[1], shape[0]) for name, shape in found.items() if len(shape) == 2}


def to_gguf_rows(name: str, b: NDArray[np.float32], base: GGUFHeader) -> NDArray[np.float32]:
    """B [out, rank] of a layer with its rows as GGUF has them. Raises ModelError: see `_heads`."""
    heads = _heads(name, b, base)
    if heads == 0:
        return b
    halves = b.reshape(heads, 2, -1, b.shape[1])  # [head, half, pair, rank]
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(b.shape)


def from_gguf_rows(name: str, b: NDArray[np.float32], base: GGUFHeader) -> NDArray[np.float32]:
    """The inverse of `to_gguf_rows`."""
    heads = _heads(name, b, base)
    if heads == 0:
        return b
    pairs = b.reshape(heads, -1, 2, b.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(b.shape)


def is_permuted(name: str, architecture: str) -> bool:
    """Whether the rows of this layer have another order in GGUF."""
    return architecture in PERMUTED and name.endswith((".q_proj", ".k_proj"))


def _heads(name: str, b: NDArray[np.float32], base: GGUFHeader) -> int:
    """Heads among whose rows to permute; 0: this layer's rows stay where they are.

    Raises ModelError where the rows cannot be shared out among the model's heads.
    """
    if not is_permuted(name, base.architecture):
        return 0
    counts = base.head_count if name.endswith(".q_proj") else base.head_count_kv
    layer = int(name.split(".")[2])
    heads = counts[layer] if layer < len(counts) else 0
    if heads < 1 or b.shape[0] % (2 * heads):
        raise ModelError(
            f"the adapter does not fit {base.path.name}: {name} has {b.shape[0]:,} rows for {heads:,} heads",
            "give the model that this adapter was trained on",
        )
    return heads
