"""The contents of a GGUF header as data: `GGUFHeader`, `TensorInfo`, and properties computed from them.

This module checks nothing: `file` fills these in and `checks` judges them.
"""

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emlocal.errors import ModelError
from emlocal.files import TOOL_USE, open_regular
from emlocal.models.gguf import types
from emlocal.models.header import Weights

MAX_HEADER_BYTES = 128 << 20  # the largest header known (Gemma 4: 262k tokens, 514k merges) has 16 MB
_U64 = struct.Struct("<Q")

Scalar = str | int | float | bool


@dataclass(frozen=True)
class ArrayRef:
    """An array left in the file (any of strings, and long ones of numbers); `header.array(key)` reads it.

    `offset` counts from byte 0 of the header's file; `offset` and `nbytes` are of the elements.
    """

    element_type: int
    length: int
    offset: int
    nbytes: int


Value = Scalar | tuple[Scalar, ...] | ArrayRef


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor in `file`, in bytes. `shape` is in GGUF order: shape[0] is the row length."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int
    file: Path


@dataclass(frozen=True)
class GGUFHeader(Weights):
    """The header of a GGUF file. For a sharded model: metadata of the first shard, tensors of all."""

    path: Path
    version: int
    metadata: Mapping[str, Value]
    # metadata key -> GGUF type code, because the native reader insists on some
    value_types: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]
    data_offset: int
    file_size: int  # bytes, of all shards together
    files: tuple[Path, ...]

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as "llama" or "qwen2"."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def name(self) -> str:
        return str(self.metadata.get("general.name", "")) or self.path.stem

    @property
    def license(self) -> str | None:
        value = self.metadata.get("general.license")
        return value if isinstance(value, str) and value else None

    @property
    def context_length(self) -> int:
        """The context length that the model was trained with, in tokens; 0 if the file does not say."""
        return self.integer("context_length") or 0

    @property
    def embedding_length(self) -> int:
        return self.integer("embedding_length") or 0

    @property
    def block_count(self) -> int:
        """Number of layers."""
        return self.integer("block_count") or 0

    @property
    def head_count(self) -> tuple[int, ...]:
        """Attention heads, one number per layer (layers without attention have 0)."""
        return self.per_layer("attention.head_count") or (0,) * self.block_count

    @property
    def head_count_kv(self) -> tuple[int, ...]:
        """Heads in the KV cache, one number per layer; as many as `head_count` if the file does not say."""
        return self.per_layer("attention.head_count_kv") or self.head_count

    @property
    def cached_heads(self) -> tuple[int, ...]:
        """`head_count_kv` with 0 for layers without a cache of their own.

        In Qwen3.5 these are three of four layers. In Gemma 4's small models the last ones use the cache of
        earlier ones.
        """
        every = self.integer("full_attention_interval") or 1
        own = self.block_count - (self.integer("attention.shared_kv_layers") or 0)
        heads = enumerate(self.head_count_kv, start=1)
        return tuple(0 if layer % every or layer > own else n for layer, n in heads)

    @property
    def key_length(self) -> int:
        """Numbers in a head's key."""
        return self.integer("attention.key_length") or self._head_size

    @property
    def value_length(self) -> int:
        """Numbers in a head's value."""
        return self.integer("attention.value_length") or self._head_size

    @property
    def _head_size(self) -> int:
        return self.embedding_length // max(self.head_count) if any(self.head_count) else 0

    @property
    def feed_forward_length(self) -> int:
        """Width of the widest layer."""
        return max(self.per_layer("feed_forward_length"), default=0)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.length if isinstance(tokens, ArrayRef) else 0

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template. It is untrusted: render it in a sandbox."""
        value = self.metadata.get("tokenizer.chat_template")
        return value if isinstance(value, str) and value else None

    @property
    def tool_template(self) -> str | None:
        """The one for conversations with tools, where the model has one of its own."""
        value = self.metadata.get(f"tokenizer.chat_template.{TOOL_USE}")
        return value if isinstance(value, str) and value else None

    @property
    def sampling(self) -> dict[str, float | int]:
        """The authors' sampling settings (`general.sampling.*`); `temp` has emlocal's name `temperature`."""
        prefix = "general.sampling."
        found = {k.removeprefix(prefix): v for k, v in self.metadata.items() if k.startswith(prefix)}
        numbers = {k: v for k, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return {"temperature" if k == "temp" else k: v for k, v in numbers.items()}

    @property
    def quantization(self) -> str:
        """The quantization that the file names ("Q4_K_M"); otherwise the tensor type with most bytes."""
        name = types.FILE_TYPES.get(int_or_none(self.metadata.get("general.file_type")) or 0)
        if "general.file_type" in self.metadata and name:
            return name
        bytes_of: Counter[str] = Counter()
        for tensor in self.tensors.values():
            bytes_of[tensor.type] += tensor.nbytes
        return bytes_of.most_common(1)[0][0] if bytes_of else "unknown"

    def value(self, name: str) -> Value | None:
        """Returns the value of the architecture's own key.

        `value("context_length")` is `metadata["llama.context_length"]`.
        """
        return self.metadata.get(f"{self.architecture}.{name}")

    def integer(self, name: str) -> int | None:
        """Returns a value that is one whole number; None if it is not."""
        return int_or_none(self.value(name))

    def per_layer(self, name: str) -> tuple[int, ...]:
        """Returns a value for each layer; one number is repeated for all layers. Empty for other values."""
        value = self.value(name)
        if isinstance(value, tuple):
            return tuple(v for v in value if isinstance(v, int))
        number = int_or_none(value)
        return () if number is None else (number,) * self.block_count

    def array(self, key: str, data: bytearray | None = None) -> tuple[Scalar, ...]:
        """Returns all elements of a metadata array. KeyError if there is no such key.

        They come from `data`, the bytes of the header, or from the file without it.
        """
        value = self.metadata[key]
        if not isinstance(value, ArrayRef):
            return value if isinstance(value, tuple) else (value,)
        if value.element_type == types.STRING:
            return tuple(raw.decode("utf-8", "replace") for raw in self.byte_strings(key, data))
        letter, _ = types.SCALARS[value.element_type]
        return struct.unpack(f"<{value.length}{letter}", self._elements(value, data))

    def byte_strings(self, key: str, data: bytearray | None = None) -> list[bytes]:
        """Returns the elements of an array of strings as bytes, since tokens need not be UTF-8.

        KeyError if it is not such an array.
        """
        ref = self.metadata[key]
        if not isinstance(ref, ArrayRef) or ref.element_type != types.STRING:
            raise KeyError(key)
        raw, strings, pos, unpack = self._elements(ref, data), [], 0, _U64.unpack_from
        for _ in range(ref.length):  # hundreds of thousands of turns
            start = pos + 8
            pos = start + unpack(raw, pos)[0]
            strings.append(raw[start:pos])
        return strings

    def _elements(self, ref: ArrayRef, data: bytearray | None) -> bytes:
        if data is not None:
            return bytes(memoryview(data)[ref.offset : ref.offset + ref.nbytes])
        with open_regular(self.path) as file:
            file.seek(ref.offset)
            read = file.read(ref.nbytes)
        if len(read) != ref.nbytes:
            raise unusable(self.path, "it became shorter during reading")
        return read


def int_or_none(value: Value | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def unusable(path: Path, what: str) -> ModelError:
    """Returns the error for a fault in a GGUF file; all of them have this form."""
    return ModelError(
        f"{path.name} is not a usable GGUF file: {what}",
        hint="fetch the file again (from the hub: emlocal models rm NAME, then emlocal models pull NAME)",
    )


def shown(text: str | bytes, most: int = 80) -> str:
    """Returns `text` from a file, safe for a terminal: no control characters, at most `most` characters."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return plain + ("…" if len(text) > most else "")
