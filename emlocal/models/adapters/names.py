"""Layers by the names of transformers and of GGUF, and the order of Q's and K's rows in each.

llama.cpp rotates neighbouring pairs of a head's values in models of the Llama family, transformers a value
and the one half a head further on. So llama.cpp's converter reorders the rows of Q and K for that family,
and an adapter's B has to follow. Sources: conversion/llama.py (`undo_permute`) and llama_model_rope_type of
llama.cpp. An architecture that is in neither set below is refused: a guess would be garbage that loads.

MLX's folder: adapter_config.json and adapters.safetensors, as mlx-lm writes and loads them.

Keys are layer + `.lora_a` [in, rank] or `.lora_b` [rank, out]; y += scale · (x A) B, with one rank and one
scale for all layers (`lora_parameters`). Source: mlx_lm/tuner/lora.py and utils.py of mlx-lm 0.32.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from emlocal.errors import ModelError
from emlocal.models.adapters.adapter import Adapter, LoraPair, checked_pair, unusable
from emlocal.models.adapters.folder import CONFIG, halves, read_config, unsupported, write_folder
from emlocal.models.gguf.header import GGUFHeader, shown
from emlocal.models.safetensors import read_floats, read_safetensors_header

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


WEIGHTS = "adapters.safetensors"
_SUFFIXES = (".lora_a", ".lora_b")
_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")


def read_mlx(folder: Path) -> Adapter:
    """Read an MLX folder.

    Raises ModelError for what is missing, broken, or another kind of fine-tuning (DoRA, full, LoRA on
    embeddings or experts).
    """
    where = folder.name
    config = read_config(folder)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise unsupported(where, "DoRA" if kind == "dora" else f"fine_tune_type = {shown(str(kind))}")
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise unusable(where, f"{CONFIG} has no number lora_parameters.scale")
    header = read_safetensors_header(folder / WEIGHTS)
    pairs = {}
    for name, (a_name, b_name) in halves(header, "", _SUFFIXES, {}).items():
        if name.endswith("embed_tokens"):
            raise unsupported(where, f"LoRA on embeddings ({shown(name)})")
        a, b = read_floats(header, a_name), read_floats(header, b_name)
        pairs[name] = checked_pair(where, name, a.T.copy(), b.T.copy(), scale)
    base = config.get("model")
    return Adapter(pairs, base if isinstance(base, str) else "")


def write_mlx(adapter: Adapter, folder: Path, *, replace: bool = False) -> None:
    """Write an MLX folder, float32, whole or not at all.

    MLX has one rank and one scale for all layers. The highest rank and the commonest scale are used: lower
    ranks are filled up with zeros, other scales are multiplied into B.

    Raises UsageError or EmlocalError where the folder exists (`replace`: is no adapter) or cannot be
    written, ModelError for scales so far apart that B overflows.
    """
    rank = max(pair.rank for pair in adapter.pairs.values())
    scale = Counter(pair.scale for pair in adapter.pairs.values() if pair.scale).most_common(1)
    common = scale[0][0] if scale else 1.0
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, pair in adapter.pairs.items():
        b = folded(name, pair, common)
        missing = rank - pair.rank
        tensors[f"{name}.lora_a"] = np.pad(pair.a, ((0, missing), (0, 0))).T
        tensors[f"{name}.lora_b"] = np.pad(b, ((0, 0), (0, missing))).T
    keys = {match[1] if (match := _LAYER.fullmatch(name)) else name for name in adapter.pairs}
    config = {
        **({"model": adapter.base_model} if adapter.base_model else {}),
        "fine_tune_type": "lora",
        "num_layers": -1,  # all; a layer without tensors in the file is left as it is
        "lora_parameters": {"rank": rank, "scale": common, "dropout": 0.0, "keys": sorted(keys)},
    }
    write_folder(folder, config, WEIGHTS, tensors, replace)


def folded(name: str, pair: LoraPair, scale: float) -> NDArray[np.float32]:
    """B for a file that says `scale` (not 0) where this layer's own is another. Raises ModelError."""
    if pair.scale == scale:
        return pair.b
    with np.errstate(over="ignore"):
        b = (pair.b.astype(np.float64) * (pair.scale / scale)).astype(np.float32)
    if not np.isfinite(b).all():
        raise ModelError(
            f"the scale of {name}, {pair.scale:g}, cannot be written beside the commonest, {scale:g}",
            "write the adapter as a PEFT folder",
        )
    return b
