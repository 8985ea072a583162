"""A GGUF LoRA file, as llama.cpp's llama-adapter.cpp reads it.

Tensors are `<tensor of the model>.lora_a` [rank, in] and `.lora_b` [out, rank] (in numpy's order). One
`adapter.lora.alpha` is for all layers, and a layer's scale is alpha / rank. An alpha of 0 or none means scale
1.

Layers have other names than in transformers, and Q's and K's rows another order. In models of the Llama
family llama.cpp rotates neighbouring pairs of a head's values, transformers a value and the one half a head
further on. So llama.cpp's converter reorders the rows of Q and K for that family, and an adapter's B must
follow. Sources: conversion/llama.py (`undo_permute`) and llama_model_rope_type of llama.cpp. An architecture
in neither set below is refused: a wrong guess would load and give garbage.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from emlocal.errors import EmlocalError, ModelError
from emlocal.files import atomic_path, open_regular
from emlocal.models.adapters.adapter import Adapter, check_fits, checked_pair, folded
from emlocal.models.adapters.folders import unsupported
from emlocal.models.gguf import GGUFHeader, TensorInfo, read_adapter_pairs
from emlocal.models.gguf.header import shown, unusable

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
    """Raises ModelError unless emlocal knows the order of this architecture's rows in GGUF."""
    if architecture not in PERMUTED | UNPERMUTED:
        raise _unknown(architecture)


def _unknown(architecture: str) -> ModelError:
    known = ", ".join(sorted(PERMUTED | UNPERMUTED))
    return ModelError(
        f"emlocal cannot translate adapters to or from GGUF for the architecture {shown(architecture)}",
        f"emlocal knows {known}; for others use llama.cpp's convert_lora_to_gguf.py",
    )


@cache  # 10 ms and more, and training writes an adapter at each step
def gguf_names(architecture: str, layers: int) -> Mapping[str, str]:
    """Returns GGUF's name of each linear layer by transformers' name: "blk.0.attn_q.weight".

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
    """Returns [out, in] of each linear layer that a GGUF model has, by transformers' name."""
    there = base.tensors
    names = gguf_names(base.architecture, base.block_count)
    found = {name: there[stored].shape for name, stored in names.items() if stored in there}
    return {name: (shape[1], shape[0]) for name, shape in found.items() if len(shape) == 2}


def to_gguf_rows(name: str, b: NDArray[np.float32], base: GGUFHeader) -> NDArray[np.float32]:
    """Returns B [out, rank] of a layer with its rows in GGUF's order. Raises ModelError: see `_heads`."""
    heads = _heads(name, b, base)
    if heads == 0:
        return b
    halves = b.reshape(heads, 2, -1, b.shape[1])  # [head, half, pair, rank]
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(b.shape)


def from_gguf_rows(name: str, b: NDArray[np.float32], base: GGUFHeader) -> NDArray[np.float32]:
    """Returns B with its rows in transformers' order: the inverse of `to_gguf_rows`."""
    heads = _heads(name, b, base)
    if heads == 0:
        return b
    pairs = b.reshape(heads, -1, 2, b.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(b.shape)


def is_permuted(name: str, architecture: str) -> bool:
    """Returns whether the rows of this layer have another order in GGUF."""
    return architecture in PERMUTED and name.endswith((".q_proj", ".k_proj"))


def _heads(name: str, b: NDArray[np.float32], base: GGUFHeader) -> int:
    """Returns the number of heads whose rows are permuted; 0 if this layer's rows keep their order.

    Raises ModelError if the rows cannot be divided among the model's heads.
    """
    if not is_permuted(name, base.architecture):
        return 0
    counts = base.head_count if name.endswith(".q_proj") else base.head_count_kv
    layer = int(name.split(".")[2])
    heads = counts[layer] if layer < len(counts) else 0
    if heads < 1 or b.shape[0] % (2 * heads):
        raise ModelError(
            f"the adapter does not fit {base.path.name}: {name} has {b.shape[0]:,} rows for {heads:,} heads",
            "use the model that this adapter was trained on",
        )
    return heads


BASE_NAME = "general.base_model.0.name"
_ALORA = "adapter.alora.invocation_tokens"
_MOST_LAYERS = 1024


def read_gguf(path: Path, base: GGUFHeader | None) -> Adapter:
    """Reads a GGUF LoRA file and puts its rows into transformers' order.

    Raises ModelError for broken or unsupported files, if `base` is missing and its number of heads is needed,
    and if the adapter does not fit it.
    """
    architecture, adapter = read_in_file_order(path)
    if base is None:
        permuted = next((name for name in adapter.pairs if is_permuted(name, architecture)), None)
        if permuted is not None:
            raise ModelError(
                f"the rows of {permuted} are in GGUF's order in {path.name}; to put them into that of other"
                " formats takes the base model's number of heads",
                "give the base model too: --base MODEL, of emlocal adapter convert, for a PEFT folder",
            )
        return adapter
    if architecture != base.architecture:
        raise ModelError(
            f"{path.name} is for the architecture {shown(architecture)},"
            f" {base.path.name} is {base.architecture}",
            "use the model that this adapter was trained on",
        )
    check_fits(adapter, linear_shapes(base), base.path.name)
    pairs = {n: replace(pair, b=from_gguf_rows(n, pair.b, base)) for n, pair in adapter.pairs.items()}
    return Adapter(pairs, adapter.base_model)


def read_in_file_order(path: Path) -> tuple[str, Adapter]:
    """Returns the architecture and the pairs, with Q's and K's rows in the file's order.

    Raises ModelError for a broken file, and for anything but plain LoRA on the linear layers of a known
    architecture.
    """
    header, tensors = read_adapter_pairs(path)
    if _ALORA in header.metadata:
        raise unsupported(path.name, "activated LoRA (adapter.alora.invocation_tokens)")
    alone = next((n for n in header.tensors if not n.endswith((".lora_a", ".lora_b"))), None)
    if alone is not None:
        raise unsupported(path.name, f"weights beside LoRA ({shown(alone)})")
    names = {there: name for name, there in gguf_names(header.architecture, _layers(path, tensors)).items()}
    alpha = header.metadata.get("adapter.lora.alpha")
    alpha = alpha if isinstance(alpha, float) else 0.0
    pairs = {}
    for there, (a_info, b_info) in tensors.items():
        if there not in names:
            what = "LoRA on embeddings" if there.startswith("token_embd") else "LoRA"
            raise unsupported(path.name, f"{what} on {shown(there)}")
        a, b = _floats(path, a_info), _floats(path, b_info)
        scale = alpha / b.shape[-1] if alpha and b.shape[-1] else 1.0
        pairs[names[there]] = checked_pair(path.name, names[there], a, b, scale)
    said = header.metadata.get(BASE_NAME)
    return header.architecture, Adapter(pairs, said if isinstance(said, str) else "")


def write_gguf(adapter: Adapter, path: Path, base: GGUFHeader) -> None:
    """Writes a GGUF LoRA file (F32) for the model `base`, whole or not at all; replaces an existing `path`.

    The commonest alpha becomes the file's; layers that need another one have the difference in their B.

    Raises ModelError if the adapter does not fit `base` or the architecture is not known, EmlocalError if
    nothing can be written.
    """
    check_fits(adapter, linear_shapes(base), base.path.name)
    import gguf  # 0.1 s

    names = gguf_names(base.architecture, base.block_count)
    alpha = _commonest_alpha(adapter)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, base.architecture)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            if adapter.base_model:
                writer.add_string(BASE_NAME, adapter.base_model)
            for name, pair in adapter.pairs.items():
                b = to_gguf_rows(name, folded(name, pair, alpha / pair.rank), base)
                writer.add_tensor(f"{names[name]}.lora_a", np.ascontiguousarray(pair.a, np.float32))
                writer.add_tensor(f"{names[name]}.lora_b", np.ascontiguousarray(b, np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            assert writer.fout is not None
            written = writer.fout[0].tell()
        finally:
            writer.close()
        held = temporary.stat().st_size
        if held < written:  # numpy's tofile, which gguf uses, does not tell when the disk is full
            raise EmlocalError(
                f"cannot write {path}: {held:,} of {written:,} bytes",
                "free some disk space, or write to another folder",
            )


def _commonest_alpha(adapter: Adapter) -> float:
    """Returns the commonest alpha, as a float32, and never 0, which would mean something else in the file."""
    alphas = Counter(float(np.float32(p.scale * p.rank)) for p in adapter.pairs.values())
    del alphas[0.0]
    return alphas.most_common(1)[0][0] if alphas else 1.0


def _layers(path: Path, tensors: dict[str, tuple[TensorInfo, TensorInfo]]) -> int:
    """Returns the number of layers: one more than the highest layer that a tensor's name mentions."""
    numbers = [n.split(".")[1] for n in tensors if n.startswith("blk.")]
    highest = max((int(n) for n in numbers if n.isdecimal() and len(n) < 6), default=0)
    if highest >= _MOST_LAYERS:
        raise unusable(path, f"it changes layer {highest:,}; models have at most {_MOST_LAYERS:,}")
    return highest + 1


def _floats(path: Path, tensor: TensorInfo) -> NDArray[np.float32]:
    """Returns a tensor of any type as float32, in numpy's order of dimensions."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with open_regular(path) as file:
        file.seek(tensor.offset)
        data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise unusable(path, "it became shorter during reading")
    shape = tensor.shape[::-1]
    try:
        rows = np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1)
        return dequantize(rows, GGMLQuantizationType[tensor.type]).reshape(shape)
    except (NotImplementedError, KeyError):
        raise unsupported(path.name, f"weights of type {tensor.type}") from None
