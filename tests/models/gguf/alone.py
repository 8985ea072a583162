"""Sound models with one change: each key that llama.cpp knows, and each tensor, alone."""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

from emlocal.models.gguf.types import TENSOR_TYPES
from tests.tiny_architectures import architecture_metadata, architecture_tensors, general_architecture
from tests.tiny_gguf import (
    BOOL,
    GGML_F16,
    GGML_F32,
    U32,
    U64,
    Tensor,
    Value,
    array,
    boolean,
    f32,
    floats,
    i32,
    ints,
    strings,
    text,
    u16,
    u32,
)

INTEGERS = (
    *(
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        12,
        16,
        20,
        31,
        32,
        33,
        63,
        64,
        65,
        128,
        255,
        256,
        294,
        512,
        513,
        1024,
        1025,
    ),
    *(1 << 16, (1 << 20) + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
)
FLOATS = (0.0, -0.0, -1.0, 0.5, 1.0, 1e-45, 1e30, 3e38, -3e38, float("inf"), float("-inf"), float("nan"))
FILLS = (0x00, 0x7F, 0xFF)
SHAPES = ((1,), (4,), (8,), (16,), (32,), (64,), (32, 32), (32, 64), (64, 32), (32, 294))
TEXTS = (
    "",
    "x",
    "none",
    "linear",
    "yarn",
    "longrope",
    "llama",
    "gpt2",
    "bert",
    "rwkv",
    "plamo2",
    "t5",
    "A\0B",
)
LENGTHS = (0, 1, 2, 4, 294, 513)
KEY_OF_AN_ARCHITECTURE = re.compile(rb"(?<=\0)%s\.([a-z0-9_.]*[a-z0-9_])(?=\0)")
TENSOR = re.compile(rb"(?<=\0)(?:blk\.%d\.|output|token_|rope_|per_layer_)[a-z0-9_.]*[a-z0-9_](?=\0)")
SHORT_TENSORS = {
    *(f"blk.%d.{name}" for name in ("attn_q", "attn_k", "attn_v", "attn_norm", "ffn_norm")),
    *(
        f"blk.%d.{name}"
        for name in ("ffn_gate", "ffn_up", "ffn_down", "ffn_gate.0", "ffn_up.0", "ffn_down.0")
    ),
    *("output", "output_norm", "token_embd", "position_embd", "dense_2", "dense_3", "cls", "cls.output"),
}
KEY_OF_ALL = re.compile(rb"(?<=\0)(?:tokenizer|general|split|xielu)\.[a-z0-9_.]*[a-z0-9_](?=\0)")


class Changed(NamedTuple):
    """A changed file before it is written; most are skipped."""

    what: str
    metadata: Mapping[str, Value]
    tensors: Sequence[Tensor]


@cache
def values() -> dict[str, Value]:
    """Returns values for a key, by a name for messages: each type, edge cases and nonsense."""
    found: dict[str, Value] = {f"u32 {n}": u32(n) for n in INTEGERS}
    found |= {f"f32 {n}": f32(n) for n in FLOATS}
    found |= {f"bool {n}": boolean(n) for n in (0, 1)}
    found |= {f"text {t!r}": text(t) for t in TEXTS}
    found |= {f"i32 {n}": i32(n) for n in (-1, 0, 1, -(1 << 31))}
    found |= {
        "u16 1": u16(1),
        "u64 1": (U64, struct.pack("<Q", 1)),
        "u64 1<<63": (U64, struct.pack("<Q", 1 << 63)),
    }
    for n in LENGTHS:
        for number in (-1, 0, 1, 7):
            found[f"[i32 {number}] * {n}"] = ints([number] * n)
        found[f"[u32 1] * {n}"] = array(U32, struct.pack("<I", 1) * n, n)
        for flag in (0, 1):
            found[f"[bool {flag}] * {n}"] = array(BOOL, bytes([flag]) * n, n)
        for real in (1.0, float("nan")):
            found[f"[f32 {real}] * {n}"] = floats([real] * n)
        found[f"['a'] * {n}"] = strings(["a"] * n)
    return found


@cache
def keys_of_llama_cpp() -> tuple[str, ...]:
    """Returns all keys in the installed library's own table; `%s.` stands for the architecture."""
    raw = _library()
    own = {f"%s.{match[1].decode()}" for match in KEY_OF_AN_ARCHITECTURE.finditer(raw)}
    return (*sorted(own), *sorted({match[0].decode() for match in KEY_OF_ALL.finditer(raw)}))


@cache
def tensors_of_llama_cpp() -> tuple[str, ...]:
    """Returns names of tensors in the installed library's own table, without ".weight" and the like.

    The compiler stores the shortest names elsewhere, so these are listed here.
    """
    return tuple(sorted({m[0].decode() for m in TENSOR.finditer(_library())} | SHORT_TENSORS))


@cache
def _library() -> bytes:
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    return next(p for p in sorted(folder.iterdir()) if p.stem in ("libllama", "llama")).read_bytes()


def with_one_key_changed(architecture: str) -> Iterator[Changed]:
    """Yields a file for every key that llama.cpp knows and every value, and one without the key."""
    metadata, tensors = architecture_metadata(architecture), architecture_tensors(architecture)
    for name in keys_of_llama_cpp():
        key = name.replace("%s", general_architecture(architecture))
        if key in metadata:
            rest = {k: v for k, v in metadata.items() if k != key}
            yield Changed(f"{architecture}: no {key}", rest, tensors)
        for label, value in values().items():
            yield Changed(f"{architecture}: {key} = {label}", metadata | {key: value}, tensors)


def with_one_tensor_changed(architecture: str) -> Iterator[Changed]:
    """Yields files with each tensor missing, of each type, transposed or nonsense, and with extra ones."""
    metadata, tensors = architecture_metadata(architecture), architecture_tensors(architecture)
    for index, tensor in enumerate(tensors):
        others = [*tensors[:index], *tensors[index + 1 :]]
        changed = {"gone": None, "turned": replace(tensor, shape=tensor.shape[::-1])}
        changed |= {f"of {fill:#x}": replace(tensor, data=bytes([fill]) * len(tensor.data)) for fill in FILLS}
        for code, (name, block, size) in TENSOR_TYPES.items():
            if tensor.shape[0] % block == 0:
                data = bytes(prod(tensor.shape) // block * size)
                changed[f"of type {name}"] = replace(tensor, type=code, data=data)
        for label, new in changed.items():
            put = [*tensors[:index], new, *tensors[index + 1 :]] if new is not None else others
            yield Changed(f"{architecture}: {tensor.name} {label}", metadata, put)
    there = {tensor.name for tensor in tensors}
    for stem in tensors_of_llama_cpp():
        for suffix in (".weight", ".bias", ".scale", ".input_scale"):
            name = stem.replace("%d", "0") + suffix
            for shape in SHAPES if name not in there else ():
                for code, bytes_each in ((GGML_F32, 4), (GGML_F16, 2)):
                    new = Tensor(name, shape, bytes(prod(shape) * bytes_each), code)
                    label = f"{architecture}: {name} {shape} of type {code} added"
                    yield Changed(label, metadata, [*tensors, new])
