"""GGUF models and LoRA adapters: headers are read and checked before native code gets the file.

    header = read_header(Path("model.gguf"))
    header.architecture, header.context_length, header.quantization, header.weights_bytes

A sharded model (`model-00001-of-00003.gguf`) is read as one, from any of its shards. An adapter is checked
against the model that it is for.
"""

import re
from dataclasses import replace
from math import isfinite
from pathlib import Path
from types import MappingProxyType

from emlocal.errors import ModelError
from emlocal.files import open_regular
from emlocal.models.gguf import types
from emlocal.models.gguf.checks import check_language_model, check_tokens
from emlocal.models.gguf.file import Known, parse_file, recall, remember
from emlocal.models.gguf.header import ArrayRef, GGUFHeader, TensorInfo, int_or_none, shown, unusable

__all__ = [
    "MAX_LORA_RANK",
    "ArrayRef",
    "GGUFHeader",
    "TensorInfo",
    "read_adapter_header",
    "read_adapter_pairs",
    "read_header",
    "shard_paths",
]


_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def read_header(path: Path) -> GGUFHeader:
    """Reads and checks a language model. Raises ModelError with one line that says what is wrong and where.

    llama.cpp loads every file that this accepts, or refuses it with an error; docs/models.md gives the
    grounds.
    """
    shards = shard_paths(path)
    missing = [p.name for p in shards if not p.exists()]
    if missing and len(shards) > 1:
        raise ModelError(
            f"{path.name} is one of {len(shards)} shards and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing beside it",
            hint="put all shards into one folder, or fetch the model again: emlocal models pull NAME",
        )
    known = recall(shards[0])
    first = known or Known(bytearray(), {})
    headers = [parse_file(shards[0], first), *map(parse_file, shards[1:])]
    for number, header in enumerate(headers):
        _check_split(header, number, len(headers))
    header = headers[0] if len(headers) == 1 else _merge(headers)
    check_language_model(header)
    if known is None:
        check_tokens(header, first.data)
        remember(headers[0], first.data[: headers[0].data_offset])
    return header


def shard_paths(path: Path) -> tuple[Path, ...]:
    """Returns all files of the model that `path` is (a shard of), by its name. llama.cpp opens the first."""
    match = _SHARD.fullmatch(path.name)
    if match is None or not 1 < int(match["count"]) <= 999:
        return (path,)
    numbers = range(1, int(match["count"]) + 1)
    return tuple(path.with_name(f"{match['stem']}-{n:05d}-of-{match['count']}.gguf") for n in numbers)


def _check_split(header: GGUFHeader, number: int, count: int) -> None:
    """Checks that the metadata of a shard agree with its name. llama.cpp asserts the type of split.no."""
    if count == 1:
        said = header.metadata.get("split.count", 1)
        if int_or_none(said) not in (0, 1):
            name = "model-00001-of-00003.gguf"
            raise unusable(header.path, f"split.count is {shown(str(said))}, but it is not named like {name}")
        return
    for key, want in (("split.no", number), ("split.count", count)):
        value = header.metadata.get(key)
        # Only the first shard must have the count.
        if key == "split.count" and number and value is None:
            continue
        if value != want or header.value_types.get(key) != types.UINT16:
            raise unusable(header.path, f"{key} is {shown(str(value))}, but by its name it is {want}")


def _merge(headers: list[GGUFHeader]) -> GGUFHeader:
    """Returns one header for all shards: metadata of the first, tensors of all."""
    first = headers[0]
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise unusable(header.path, f"the tensor {shown(name)} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    said = int_or_none(first.metadata.get("split.tensors.count"))
    if said != len(tensors):
        raise unusable(
            first.path, f"split.tensors.count is {said}, but the shards hold {len(tensors):,} tensors"
        )
    return replace(
        first,
        tensors=MappingProxyType(tensors),
        file_size=sum(h.file_size for h in headers),
        files=tuple(h.path for h in headers),
    )


MAX_LORA_RANK = 4096  # the widest layer of the largest model in the catalog; a higher rank saves nothing


def read_adapter_header(path: Path, base: GGUFHeader) -> GGUFHeader:
    """Reads and checks a GGUF LoRA adapter against the model it is for. Raises ModelError.

    llama.cpp checks shapes itself (llama-adapter.cpp), but it asserts the types of the metadata, and accepts
    NaN weights and non-finite alphas.
    """
    header = parse_file(path)
    for key, want in (*_KIND, ("general.architecture", base.architecture)):
        if not _says(header, key, want):
            said = shown(str(header.metadata.get(key)))
            raise ModelError(
                f"{path.name} does not fit {base.path.name}: its {key} is {said}, not {want}",
                hint="use the model that this adapter was trained on",
            )
    _check_alpha(header)
    for name, (a, b) in _pairs(header).items():
        _check_pair(path, base, name, a, b)
    return header


def read_adapter_pairs(path: Path) -> tuple[GGUFHeader, dict[str, tuple[TensorInfo, TensorInfo]]]:
    """Reads a GGUF LoRA adapter's header without a model to compare with: (A, B) by adapted tensor.

    It checks the container, the kind of file, and that each A has its B. Raises ModelError.
    """
    header = parse_file(path)
    for key, want in _KIND:
        if not _says(header, key, want):
            said = shown(str(header.metadata.get(key)))
            raise ModelError(
                f"{path.name} is not a LoRA adapter: its {key} is {said}, not {want}",
                hint="name a GGUF LoRA adapter, or a PEFT or MLX folder",
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
    """Returns the two factors of each adapted tensor, by the name of the tensor in the base model."""
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
        raise unusable(header.path, "it changes no tensor")
    return pairs


def _check_pair(path: Path, base: GGUFHeader, name: str, a: TensorInfo, b: TensorInfo) -> None:
    target = base.tensors.get(name)
    if target is None:
        raise unusable(path, f"it changes {shown(name)}, which {base.path.name} does not have")
    if min(len(a.shape), len(b.shape), len(target.shape)) < 2:
        raise unusable(path, f"{shown(name)} is not a matrix in all three of the model, .lora_a and .lora_b")
    # A is [in, rank] and B [rank, out] in GGUF order; for the embedding, A and B are the other way round.
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
    """Raises ModelError for NaN or infinity among the weights: one of them makes every logit NaN."""
    exponent_bits = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
    if tensor.type not in exponent_bits:
        return  # quantized: only scales could be infinite, and such adapters are rare
    import numpy as np  # imported here, because `emlocal models path` does not need it otherwise

    dtype, mask = exponent_bits[tensor.type]
    with open_regular(path) as file:
        file.seek(tensor.offset)
        bits = np.frombuffer(file.read(tensor.nbytes), dtype)
    if ((bits & mask) == mask).any():
        raise unusable(path, f"{shown(tensor.name)} has weights that are infinite or not a number")


def _dims(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{d:,}" for d in shape)
