"""GGUF LoRA adapters: the header read, and checked against the model that the adapter is for."""

from math import isfinite
from pathlib import Path

from emlocal.errors import ModelError
from emlocal.models.gguf import types
from emlocal.models.gguf.file import parse_file
from emlocal.models.gguf.header import GGUFHeader, TensorInfo, shown, unusable
from emlocal.models.regular import open_regular

MAX_LORA_RANK = 4096  # the widest layer of the largest model in the catalog; beyond it LoRA saves nothing


def read_adapter_header(path: Path, base: GGUFHeader) -> GGUFHeader:
    """Read and check a GGUF LoRA adapter against the model it is for. Raises ModelError.

    llama.cpp checks shapes itself (llama-adapter.cpp) but asserts the types of the metadata, and takes NaN
    weights and non-finite alphas as they come.
    """
    header = parse_file(path)
    for key, want in (*_KIND, ("general.architecture", base.architecture)):
        if not _says(header, key, want):
            said = shown(str(header.metadata.get(key)))
            raise ModelError(
                f"{path.name} does not fit {base.path.name}: its {key} is {said}, not {want}",
                hint="give the model this adapter was trained on",
            )
    _check_alpha(header)
    for name, (a, b) in _pairs(header).items():
        _check_pair(path, base, name, a, b)
    return header


def read_adapter_pairs(path: Path) -> tuple[GGUFHeader, dict[str, tuple[TensorInfo, TensorInfo]]]:
    """Read a GGUF LoRA adapter's header without a model to compare with: (A, B) by adapted tensor.

    Checked are the container, the kind of file, and that each A has its B. Raises ModelError.
    """
    header = parse_file(path)
    for key, want in _KIND:
        if not _says(header, key, want):
            said = shown(str(header.metadata.get(key)))
            raise ModelError(
                f"{path.name} is not a LoRA adapter: its {key} is {said}, not {want}",
                hint="give a GGUF LoRA adapter, or a PEFT or MLX folder",
            )
    _check_alpha(header)
    return header, _pairs(header)


_KIND = (("general.type", "adapter"), ("adapter.type", "lora"))


def _says(header: GGUFHeader, key: str, want: str) -> bool:
    return header.metadata.get(key) == want and header.value_types[key] == types.STRING


def _check_alpha(header: GGUFHeader) -> None:
    alpha = header.metadata.get("adapter.lora.alpha")
    if alpha is not None and header.value_types["adapter.lora.alpha"] != types.FLOAT32:
        raise unusable(header.path, "adapter.lora.alpha is not of type float32")
    if isinstance(alpha, float) and not isfinite(alpha):
        raise unusable(header.path, f"adapter.lora.alpha is {alpha}")


def _pairs(header: GGUFHeader) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """The two factors of each adapted tensor, by the name of the tensor in the base model."""
    names = {
        n.removesuffix(".lora_a").removesuffix(".lora_b")
        for n in header.tensors
        if not n.endswith("_norm.weight")
    }
    pairs = {}
    for name in sorted(names):
        a, b = header.tensors.get(f"{name}.lora_a"), header.tensors.get(f"{name}.lora_b")
        if a is None or b is None:
            half = "neither" if a is b else ("no .lora_b" if b is None else "no .lora_a")
            raise unusable(header.path, f"{shown(name)} has {half} of the two factors of a LoRA pair")
        pairs[name] = (a, b)
    if not pairs:
        raise unusable(header.path, "it adapts no tensor")
    return pairs


def _check_pair(path: Path, base: GGUFHeader, name: str, a: TensorInfo, b: TensorInfo) -> None:
    target = base.tensors.get(name)
    if target is None:
        raise unusable(path, f"it adapts {shown(name)}, which {base.path.name} does not have")
    if min(len(a.shape), len(b.shape), len(target.shape)) < 2:
        raise unusable(path, f"{shown(name)} is not a matrix in all three of the model, .lora_a and .lora_b")
    # A is [in, rank] and B [rank, out] in GGUF order; the embedding has A and B the other way round.
    if name == "token_embd.weight":
        found, rank, other = (b.shape[1], a.shape[1]), a.shape[0], b.shape[0]
    else:
        found, rank, other = (a.shape[0], b.shape[1]), a.shape[1], b.shape[0]
    if found != target.shape[:2] or a.shape[2:] != target.shape[2:] or b.shape[2:] != target.shape[2:]:
        raise unusable(
            path, f"its factors of {shown(name)} make {_dims(found)}, but the model has {_dims(target.shape)}"
        )
    if rank != other or not 1 <= rank <= MAX_LORA_RANK:
        raise unusable(path, f"its factors of {shown(name)} have ranks {rank:,} and {other:,}")
    for factor in (a, b):
        if factor.type not in types.WEIGHT_TYPES:
            raise unusable(path, f"{shown(factor.name)} is of type {factor.type}")
        _check_finite(path, factor)


def _check_finite(path: Path, tensor: TensorInfo) -> None:
    """No NaN and no infinity among the weights: one of them makes every logit NaN."""
    exponent_bits = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
    if tensor.type not in exponent_bits:
        return  # quantized: scales only, and rare in adapters
    import numpy as np  # not at the top: `emlocal models path` has no other use for it

    dtype, mask = exponent_bits[tensor.type]
    with open_regular(path) as file:
        file.seek(tensor.offset)
        bits = np.frombuffer(file.read(tensor.nbytes), dtype)
    if ((bits & mask) == mask).any():
        raise unusable(path, f"{shown(tensor.name)} has weights that are infinite or not a number")


def _dims(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{d:,}" for d in shape)
