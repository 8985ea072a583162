"""Safetensors files: headers are checked before anything maps the weights; small files are written.

The format: 8 bytes of length, that many bytes of JSON, then the tensors one after the other without gaps
(https://github.com/huggingface/safetensors#format). The bounds are those of the reference implementation.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard

from emlocal.errors import ModelError
from emlocal.files import open_regular
from emlocal.models.gguf.header import shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_HEADER_BYTES = 100_000_000
DTYPE_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
FLOATS = ("F32", "F16", "BF16")
"""The types that `read_floats` reads."""


@dataclass(frozen=True)
class SafeTensor:
    """One tensor: row-major `shape`, `offset` from byte 0 of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The header of a safetensors file. `metadata` are the strings under `__metadata__`."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, SafeTensor]


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Reads and checks the header. Raises ModelError, in one line, unless it accounts for every byte."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise _unusable(path, f"its header has {length:,} bytes, the file {size:,}")
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="name an existing file") from error
    entries = _parse(path, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _unusable(path, "its __metadata__ is not a table of strings")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise _unusable(path, f"tensor {shown(name)} starts at byte {tensor.offset:,}, expected {end:,}")
        end += tensor.nbytes
    if end != size:
        raise _unusable(path, f"its tensors end at byte {end:,} but the file has {size:,} bytes")
    return SafetensorsHeader(path, MappingProxyType(metadata), MappingProxyType(tensors))


def read_floats(header: SafetensorsHeader, name: str) -> "NDArray[np.float32]":
    """Returns one tensor as float32, exactly: F32, F16 or BF16.

    Raises ModelError for another dtype, or if the file has become shorter since its header was read.
    """
    tensor = header.tensors[name]
    if tensor.dtype not in FLOATS:
        raise _unusable(header.path, f"tensor {shown(name)} is of type {tensor.dtype}, not {_any_of(FLOATS)}")
    with open_regular(header.path) as file:
        file.seek(tensor.offset)
        data = file.read(tensor.nbytes)
    if len(data) != tensor.nbytes:
        raise _unusable(header.path, "it became shorter during reading")
    return widened(data, tensor.dtype).reshape(tensor.shape)


def widened(data: bytes, dtype: str) -> "NDArray[np.float32]":
    """Returns the numbers in `data`, of one of the `FLOATS`, as float32 [n]; writable."""
    import numpy as np  # imported here, because reading a header does not need it

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def narrowed(values: "NDArray[np.float32]", dtype: str) -> bytes:
    """Returns the inverse of `widened`, rounded to nearest, ties to even; too large numbers become inf."""
    import numpy as np

    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Adds half of the lower bits' range, and one more if the kept part is odd. NaN must not round up to inf.
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype("<u2").tobytes()


def write_safetensors(
    path: Path, tensors: "Mapping[str, NDArray[Any]]", metadata: dict[str, str] | None = None
) -> None:
    """Writes a file of dense tensors.

    Raises OSError if it cannot; the package's own error is not an OSError.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # save_file takes the bytes as they are in memory, whatever the strides
    dense = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    try:
        save_file(dense, path, metadata=metadata)
    except SafetensorError as why:
        raise OSError(str(why).removeprefix("Error while serializing: ").removeprefix("I/O error: ")) from why


def _any_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise _unusable(path, "its header has a duplicate name")
        return table

    try:
        entries = json.loads(raw.decode(), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError):
        raise _unusable(path, "its header is not JSON") from None
    if not isinstance(entries, dict):
        raise _unusable(path, "its header is not a table")
    return entries


def _tensor(path: Path, name: str, entry: object, data_start: int) -> SafeTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _unusable(path, f"tensor {shown(name)} lacks a known dtype, a shape or data_offsets")
    begin, end = offsets
    if (end - begin) * 8 != prod(shape) * bits:
        dims = " × ".join(str(d) for d in shape) or "1"
        raise _unusable(path, f"tensor {shown(name)} has {end - begin:,} bytes for {dims} of {dtype}")
    return SafeTensor(str(dtype), tuple(shape), data_start + begin, end - begin)


def _naturals(value: object) -> TypeGuard[list[int]]:
    """Returns whether it is a short list of whole numbers that fit 64 bits; true and false do not count."""
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(v) is int and 0 <= v < 1 << 63 for v in value)
    )


def _unusable(path: Path, what: str) -> ModelError:
    return ModelError(f"{path.name} is not a usable safetensors file: {what}", hint="fetch the file again")
