"""One GGUF file: a bounded reader of its header that trusts nothing the file says about itself.

Every length is checked against the bytes that exist before anything is read or allocated. Native readers have
crashed on headers that lie (llama.cpp GHSA-3p4r-fq3f-q74v, mlx #4213, Ollama CVE-2026-7482). Tensor data is
never read. `checks` judges whether the numbers fit a language model; this file knows the container only
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Headers that passed the checks are remembered, because walking through 151,936 tokens and their merges again
takes 50 ms. A header is remembered by its own content (BLAKE2b of all its bytes), not by date or size: a file
that changed has another header, however quickly it changed. All checks but those of the vocabulary are made
each time. If the remembered data are missing or damaged, everything is checked. The cache also remembers the
models that passed a trial in a process of their own (backends/llama_cpp/loading.py).
"""

import json
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from emlocal import __version__
from emlocal.errors import EmlocalError, ModelError, WrongNameError
from emlocal.files import atomic_writer, cache_dir, open_regular
from emlocal.models.gguf import types
from emlocal.models.gguf.header import (
    MAX_HEADER_BYTES,
    ArrayRef,
    GGUFHeader,
    Scalar,
    TensorInfo,
    Value,
    int_or_none,
    shown,
    unusable,
)
from emlocal.models.gguf.types import STRING

CHECKS = 1  # increase it whenever the reader or the checks of the vocabulary change within a version
LARGE = 10_000  # tokens; checking fewer takes no time
_HEADERS, _TRIALS = "checked-headers.json", "tried-models.json"
_MOST = 64  # entries of each


class Known(NamedTuple):
    """A header whose vocabulary was checked."""

    data: bytearray
    """All bytes of the header: the parser must read these very bytes, not the file again."""
    extents: Mapping[str, int]
    """Bytes of each array of strings, by metadata key."""


def recall(path: Path) -> Known | None:
    """Returns the header of this file, if one with the same bytes was remembered; otherwise None."""
    entry = _entries(_HEADERS).get(str(path.absolute()))
    if not isinstance(entry, dict):
        return None
    length, extents, digest = (entry.get(name) for name in ("length", "extents", "digest"))
    if not isinstance(length, int) or not 0 < length <= MAX_HEADER_BYTES or not isinstance(extents, dict):
        return None
    try:
        with open_regular(path) as file:
            if length > file.seek(0, 2):
                return None
            file.seek(0)
            data = bytearray(file.read(length))
    except (OSError, ModelError):  # the next reader of the file reports the reason
        return None
    return Known(data, extents) if _digest(data, extents) == digest else None


def remember(header: GGUFHeader, data: bytes | bytearray) -> None:
    """Remembers that this header, whose bytes are `data`, passed every check."""
    if header.vocab_size < LARGE:
        return
    extents = {
        key: value.nbytes
        for key, value in header.metadata.items()
        if isinstance(value, ArrayRef) and value.element_type == STRING
    }
    entries = _entries(_HEADERS)
    entries.pop(str(header.path.absolute()), None)
    entry = {"length": len(data), "extents": extents, "digest": _digest(data, extents)}
    _keep(_HEADERS, entries | {str(header.path.absolute()): entry})


def came_through(key: str) -> bool:
    """Returns whether a model passed a trial; `key` is the name for its contents."""
    return _entries(_TRIALS).get(key) is True


def remember_trial(key: str) -> None:
    """Remembers that a model passed a trial."""
    _keep(_TRIALS, _entries(_TRIALS) | {key: True})


def _keep(name: str, entries: dict[str, Any]) -> None:
    """Writes the latest entries."""
    file = cache_dir() / name
    with suppress(EmlocalError, OSError):  # the folder is not writable: checked again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(file) as stream:
            json.dump(dict(list(entries.items())[-_MOST:]), stream)


def _entries(name: str) -> dict[str, Any]:
    """Returns the entries in a file of the cache, the oldest first."""
    try:
        found = json.loads((cache_dir() / name).read_text("utf-8"))
    except (OSError, ValueError):  # no file yet, or a damaged one
        return {}
    return found if isinstance(found, dict) else {}


def _digest(data: bytes | bytearray, extents: Mapping[str, int]) -> str:
    """Returns a digest of the header, of the facts remembered about it, and of the checks that it passed."""
    import hashlib

    said = json.dumps([__version__, CHECKS, extents], sort_keys=True)
    return hashlib.blake2b(data, digest_size=32, key=hashlib.blake2b(said.encode()).digest()).hexdigest()


MAX_ENTRIES = 1 << 16  # metadata keys, and tensors; the largest models have some thousands
MAX_STRINGS = 1 << 22  # in one array; the largest vocabularies have 262k tokens
MAX_KEY_BYTES = 65_535  # the format's own limit
MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME - 1
MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
EAGER_ELEMENTS = 1024  # arrays of numbers up to this length become tuples at once
# llama.cpp maps the file and asserts that the mapping starts on a multiple of 32 (TENSOR_ALIGNMENT).
MIN_ALIGNMENT, MAX_ALIGNMENT = 32, 1 << 16

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class _Reader:
    """A reader that goes forward from byte 0, little-endian, within the file and the header's bound."""

    def __init__(self, path: Path, file: BinaryIO, size: int, known: Known) -> None:
        self.path, self.size, self.pos = path, size, 0
        self.data, self.extents = known
        self._file = file
        file.seek(len(self.data))

    def bad(self, what: str) -> ModelError:
        return unusable(self.path, what)

    def load(self, end: int, what: str) -> int:
        """Makes the bytes up to `end` available in `data`; returns how many it has."""
        if end > self.size:
            raise self.bad(f"{what} ends at byte {end:,} but the file has {self.size:,} bytes")
        if end > MAX_HEADER_BYTES:
            raise self.bad(
                f"{what} ends at byte {end:,}; a header of more than {MAX_HEADER_BYTES:,} bytes is not read"
            )
        have = len(self.data)
        if end > have:
            self.data += self._file.read(min(max(end - have, have, 1 << 20), self.size - have))
            if end > len(self.data):
                raise self.bad("it became shorter during reading")
        return len(self.data)

    def take(self, count: int, what: str) -> int:
        """Moves past the next `count` bytes and returns their position."""
        start = self.pos
        self.load(start + count, what)
        self.pos = start + count
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.take(8, what))[0])

    def string(self, what: str) -> bytes:
        length = self.u64(what)
        start = self.take(length, what)
        return bytes(self.data[start : start + length])

    def name(self, what: str, max_bytes: int) -> str:
        """Returns a key or a tensor's name: not empty, UTF-8, without NUL (which would end it early in C)."""
        raw = self.string(f"the name of {what}")
        if not 0 < len(raw) <= max_bytes:
            raise self.bad(f"the name of {what} has {len(raw):,} bytes, not 1 to {max_bytes:,}")
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise self.bad(f"the name of {what} is not UTF-8: {shown(raw)}") from None
        if "\0" in text:
            raise self.bad(f"the name of {what} contains a NUL: {shown(text)}")
        return text

    def skip_strings(self, count: int, what: str) -> None:
        """Moves past `count` strings and checks the length of each."""
        if count > MAX_STRINGS:
            raise self.bad(f"{what} has {count:,} strings; more than {MAX_STRINGS:,} are not read")
        data, unpack, pos, loaded = self.data, _U64.unpack_from, self.pos, len(self.data)
        for _ in range(count):  # hundreds of thousands of turns: the loop does as little as possible
            if pos + 8 > loaded:
                loaded = self.load(pos + 8, what)
            pos += unpack(data, pos)[0] + 8
            if pos > loaded:
                loaded = self.load(pos, what)
        self.pos = pos


def parse_file(path: Path, known: Known | None = None) -> GGUFHeader:
    """Reads and checks the header of one GGUF file (one shard, if it is sharded).

    `known`: the part that was read before; its `data` gets the bytes that are read now.

    Raises ModelError, in one line, for anything that is not a sound GGUF version 2 or 3. Takes memory and
    time in proportion to the header, whatever the header claims (0.1 s for 151,936 tokens).
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            return _parse(_Reader(path, file, size, known or Known(bytearray(), {})))
    except FileNotFoundError:
        raise WrongNameError(
            f"there is no file {path}", hint="list the models on this machine: emlocal models list"
        ) from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _parse(reader: _Reader) -> GGUFHeader:
    version, n_tensors, n_kv = _read_preamble(reader)
    metadata, value_types = _read_metadata(reader, n_kv)
    alignment = _alignment(reader, metadata, value_types)
    tensors, data_offset = _read_tensors(reader, n_tensors, alignment)
    return GGUFHeader(
        path=reader.path,
        version=version,
        metadata=MappingProxyType(metadata),
        value_types=MappingProxyType(value_types),
        tensors=MappingProxyType(tensors),
        data_offset=data_offset,
        file_size=reader.size,
        files=(reader.path,),
    )


def _read_preamble(reader: _Reader) -> tuple[int, int, int]:
    if reader.size < 24:
        raise reader.bad(f"it has {reader.size} bytes, fewer than the 24 every GGUF file starts with")
    magic = bytes(reader.data[reader.take(4, "the magic") :][:4])
    if magic != b"GGUF":
        raise reader.bad(f'it starts with "{shown(magic)}", not "GGUF"')
    version = reader.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise reader.bad("it is big-endian; only little-endian files are supported")
    if version not in (2, 3):
        raise reader.bad(f"it has GGUF version {version:,}; versions 2 and 3 are supported")
    n_tensors, n_kv = reader.u64("the number of tensors"), reader.u64("the number of keys")
    # The least bytes of a tensor: name 8+1, dimensions 4+8, type 4, offset 8. Of a key: name 8+1, type 4,
    # value 1.
    for what, count, least in (("tensors", n_tensors, 33), ("keys", n_kv, 14)):
        if count * least > reader.size:
            raise reader.bad(f"it declares {count:,} {what}, more than its {reader.size:,} bytes can hold")
        if count > MAX_ENTRIES:
            raise reader.bad(f"it declares {count:,} {what}; more than {MAX_ENTRIES:,} are not read")
    return version, n_tensors, n_kv


def _read_metadata(reader: _Reader, n_kv: int) -> tuple[dict[str, Value], dict[str, int]]:
    metadata: dict[str, Value] = {}
    value_types: dict[str, int] = {}
    for index in range(n_kv):
        key = reader.name(f"key {index}", MAX_KEY_BYTES)
        if key in metadata:
            raise reader.bad(f"the key {shown(key)} appears twice")
        value_types[key] = reader.u32(f"the type of {shown(key)}")
        metadata[key] = _read_value(reader, value_types[key], key)
    return metadata, value_types


def _read_value(reader: _Reader, type_: int, key: str) -> Value:
    what = f"the value of {shown(key)}"
    if type_ == types.STRING:
        return reader.string(what).decode("utf-8", "replace")
    if type_ == types.ARRAY:
        return _read_array(reader, what, reader.extents.get(key))
    if type_ not in types.SCALARS:
        raise reader.bad(f"{what} has the unknown type {type_}")
    letter, size = types.SCALARS[type_]
    start = reader.take(size, what)
    if type_ == types.BOOL and reader.data[start] > 1:
        raise reader.bad(f"{what} is a boolean of {reader.data[start]}, not 0 or 1")
    value: Scalar = struct.unpack_from(f"<{letter}", reader.data, start)[0]
    return value


def _read_array(reader: _Reader, what: str, extent: int | None) -> tuple[Scalar, ...] | ArrayRef:
    """Reads an array. `extent`: the bytes of its strings, if they have been walked through before."""
    element_type, length = reader.u32(what), reader.u64(what)
    if element_type == types.ARRAY:
        raise reader.bad(f"{what} is an array of arrays, which llama.cpp does not read")
    if element_type != types.STRING and element_type not in types.SCALARS:
        raise reader.bad(f"{what} is an array of the unknown type {element_type}")
    least = 8 if element_type == types.STRING else types.SCALARS[element_type][1]
    left = reader.size - reader.pos
    if length * least > left:
        raise reader.bad(f"{what} has {length:,} elements, but only {left:,} bytes of the file are left")
    start = reader.pos
    if element_type == types.STRING and extent is not None:
        reader.take(extent, what)
    elif element_type == types.STRING:
        reader.skip_strings(length, what)
    else:
        reader.take(length * least, what)
        if length <= EAGER_ELEMENTS:
            return struct.unpack_from(f"<{length}{types.SCALARS[element_type][0]}", reader.data, start)
    return ArrayRef(element_type, length, start, reader.pos - start)


def _alignment(reader: _Reader, metadata: Mapping[str, Value], value_types: Mapping[str, int]) -> int:
    if "general.alignment" not in metadata:
        return 32
    value = int_or_none(metadata["general.alignment"])
    if value is None or value_types["general.alignment"] != types.UINT32:
        raise reader.bad("general.alignment is not of type uint32")
    if value & (value - 1) or not MIN_ALIGNMENT <= value <= MAX_ALIGNMENT:
        raise reader.bad(
            f"its alignment of {value:,} is not a power of two in {MIN_ALIGNMENT} to {MAX_ALIGNMENT:,}"
        )
    return value


def _read_tensors(reader: _Reader, n_tensors: int, alignment: int) -> tuple[dict[str, TensorInfo], int]:
    """Returns the tensors and the offset of their data.

    They must follow each other without gaps, as llama.cpp demands.
    """
    infos = [_read_tensor(reader, index) for index in range(n_tensors)]
    data_offset = -(-reader.pos // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for name, shape, (type_, block, block_bytes), offset in infos:
        if name in tensors:
            raise reader.bad(f"the tensor {shown(name)} appears twice")
        if offset % alignment:
            raise reader.bad(f"tensor {shown(name)} starts at {offset:,}, not on a multiple of {alignment}")
        if offset != expected:
            kind = "overlaps the one before it" if offset < expected else "leaves a gap before it"
            raise reader.bad(f"tensor {shown(name)} {kind}: it starts at {offset:,}, expected {expected:,}")
        nbytes = prod(shape) // block * block_bytes
        end = data_offset + offset + nbytes
        if end > reader.size:
            raise reader.bad(
                f"tensor {shown(name)} ends at byte {end:,} but the file has {reader.size:,} bytes"
            )
        tensors[name] = TensorInfo(name, shape, type_, data_offset + offset, nbytes, reader.path)
        expected = -(-(offset + nbytes) // alignment) * alignment
    return tensors, data_offset


def _read_tensor(reader: _Reader, index: int) -> tuple[str, tuple[int, ...], tuple[str, int, int], int]:
    """Returns name, shape, (type, elements in a block, bytes of a block) and offset into the data section."""
    name = reader.name(f"tensor {index}", MAX_TENSOR_NAME_BYTES)
    what = f"tensor {shown(name)}"
    n_dims = reader.u32(what)
    if not 1 <= n_dims <= MAX_DIMENSIONS:
        raise reader.bad(f"{what} has {n_dims:,} dimensions, not 1 to {MAX_DIMENSIONS}")
    shape = tuple(reader.u64(what) for _ in range(n_dims))
    code = reader.u32(what)
    if code not in types.TENSOR_TYPES:
        raise reader.bad(f"{what} has the unknown type {code}")
    type_, block, block_bytes = types.TENSOR_TYPES[code]
    dims = " × ".join(f"{d:,}" for d in shape)
    if 0 in shape:
        raise reader.bad(f"{what} is empty: {dims}")
    if shape[0] % block:
        raise reader.bad(
            f"{what} has rows of {shape[0]:,}, not a multiple of the {block} elements in a {type_} block"
        )
    if prod(shape) // block * block_bytes >= 1 << 62:
        raise reader.bad(f"{what} is impossibly large: {dims}")
    return name, shape, (type_, block, block_bytes), reader.u64(what)
