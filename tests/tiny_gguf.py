"""A complete llama-architecture model of 80 kB that real llama.cpp loads, and ways to break it.

`write_tiny_gguf(path)` writes a valid one: one layer, 32 wide, a SentencePiece vocabulary with all 256 byte
tokens (so any text encodes) and a ChatML template. The weights are random from `seed`. The builder is written
by hand, not taken from the `gguf` package, because tests need values that no honest writer would write.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
GGML_F32, GGML_F16, GGML_Q8_0 = 0, 1, 8

Value = tuple[int, bytes]  # GGUF type, encoded payload

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "▁",
    "the",
    "▁the",
    "▁a",
    *"etaoinshrdlucm",
    "th",
    "he",
    "in",
    "er",
    "an",
    "re",
    "on",
    "at",
    *"123+=.,",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
TOKENS = [
    *SPECIAL,
    *(f"<0x{b:02X}>" for b in range(256)),
    *dict.fromkeys(WORDS),
    "<|im_start|>",
    "<|im_end|>",
]
TOKEN_TYPES = [2, 3, 3, *[6] * 256, *[1] * (len(TOKENS) - 261), 3, 3]  # unknown, control, byte, normal
EMBEDDING, HEADS, HEADS_KV, FFN = 32, 4, 2, 64


@dataclass
class Tensor:
    """One tensor to be written; an `offset` of None means the place where an honest writer would put it."""

    name: str
    shape: tuple[int, ...]  # GGUF order: shape[0] is the row length
    data: bytes
    type: int = GGML_F32
    offset: int | None = None
    n_dims: int | None = None


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def text(value: str | bytes) -> Value:
    return STRING, string(value)


def u16(value: int) -> Value:
    return U16, struct.pack("<H", value)


def u32(value: int) -> Value:
    return U32, struct.pack("<I", value)


def i32(value: int) -> Value:
    return I32, struct.pack("<i", value)


def f32(value: float) -> Value:
    return F32, struct.pack("<f", value)


def boolean(value: int) -> Value:
    return BOOL, struct.pack("<B", value)


def array(element_type: int, payload: bytes, count: int) -> Value:
    return ARRAY, struct.pack("<IQ", element_type, count) + payload


def strings(values: Sequence[str | bytes]) -> Value:
    return array(STRING, b"".join(map(string, values)), len(values))


def floats(values: Sequence[float]) -> Value:
    return array(F32, struct.pack(f"<{len(values)}f", *values), len(values))


def ints(values: Sequence[int]) -> Value:
    return array(I32, struct.pack(f"<{len(values)}i", *values), len(values))


def adapter_metadata(**changes: Value | None) -> dict[str, Value]:
    """Returns metadata of a LoRA adapter for the tiny model.

    `general__type=None` leaves `general.type` out.
    """
    values: dict[str, Value | None] = {
        "general.type": text("adapter"),
        "general.architecture": text("llama"),
        "adapter.type": text("lora"),
        "adapter.lora.alpha": f32(8.0),
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def tiny_metadata() -> dict[str, Value]:
    """Returns metadata of the tiny model, for changes."""
    return {
        "general.architecture": text("llama"),
        "general.name": text("Tiny"),
        "general.file_type": u32(0),
        "general.license": text("apache-2.0"),
        "general.sampling.temp": f32(0.5),
        "general.sampling.top_k": i32(20),
        "llama.context_length": u32(256),
        "llama.embedding_length": u32(EMBEDDING),
        "llama.block_count": u32(1),
        "llama.feed_forward_length": u32(FFN),
        "llama.attention.head_count": u32(HEADS),
        "llama.attention.head_count_kv": u32(HEADS_KV),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "llama.rope.dimension_count": u32(EMBEDDING // HEADS),
        "llama.rope.freq_base": f32(10000.0),
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.tokens": strings(TOKENS),
        "tokenizer.ggml.scores": floats([-float(i) for i in range(len(TOKENS))]),
        "tokenizer.ggml.token_type": ints(TOKEN_TYPES),
        "tokenizer.ggml.bos_token_id": u32(1),
        "tokenizer.ggml.eos_token_id": u32(len(TOKENS) - 1),
        "tokenizer.ggml.unknown_token_id": u32(0),
        "tokenizer.ggml.add_bos_token": boolean(1),
        "tokenizer.chat_template": text(CHAT_TEMPLATE),
    }


def tiny_tensors(seed: int = 0) -> list[Tensor]:
    """Returns weights of the tiny model: random matrices, norms of one."""
    rng = np.random.default_rng(seed)
    kv = EMBEDDING * HEADS_KV // HEADS

    def matrix(name: str, columns: int, rows: int) -> Tensor:
        weights = rng.normal(0.0, 0.3, (rows, columns)).astype("<f4")
        return Tensor(name, (columns, rows), weights.tobytes())

    def norm(name: str) -> Tensor:
        return Tensor(name, (EMBEDDING,), np.ones(EMBEDDING, "<f4").tobytes())

    return [
        matrix("token_embd.weight", EMBEDDING, len(TOKENS)),
        norm("output_norm.weight"),
        norm("blk.0.attn_norm.weight"),
        matrix("blk.0.attn_q.weight", EMBEDDING, EMBEDDING),
        matrix("blk.0.attn_k.weight", EMBEDDING, kv),
        matrix("blk.0.attn_v.weight", EMBEDDING, kv),
        matrix("blk.0.attn_output.weight", EMBEDDING, EMBEDDING),
        norm("blk.0.ffn_norm.weight"),
        matrix("blk.0.ffn_gate.weight", EMBEDDING, FFN),
        matrix("blk.0.ffn_up.weight", EMBEDDING, FFN),
        matrix("blk.0.ffn_down.weight", FFN, EMBEDDING),
    ]


def build(
    metadata: Mapping[str, Value] | Sequence[tuple[str | bytes, Value]],
    tensors: Sequence[Tensor],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    n_kv: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """Returns the bytes of a GGUF file.

    Counts and offsets may lie; `metadata` as a sequence may repeat keys.
    """
    pairs = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    out = bytearray(magic + struct.pack("<I", version))
    out += struct.pack(
        "<QQ", len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_kv is None else n_kv
    )
    for key, (type_, payload) in pairs:
        out += string(key) + struct.pack("<I", type_) + payload
    data = bytearray()
    for tensor in tensors:
        n_dims = len(tensor.shape) if tensor.n_dims is None else tensor.n_dims
        out += string(tensor.name) + struct.pack("<I", n_dims)
        out += b"".join(struct.pack("<Q", d) for d in tensor.shape)
        out += struct.pack("<IQ", tensor.type, len(data) if tensor.offset is None else tensor.offset)
        data += tensor.data + bytes(-len(tensor.data) % alignment)
    return bytes(out + bytes(-len(out) % alignment) + data)


def tiny_gguf(*, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE, **metadata: Value | None) -> bytes:
    """Returns the tiny model as bytes. `metadata` replaces, adds or (None) drops keys; `__` is a dot."""
    kv = tiny_metadata()
    if chat_template is None:
        del kv["tokenizer.chat_template"]
    else:
        kv["tokenizer.chat_template"] = text(chat_template)
    for name, value in metadata.items():
        key = name.replace("__", ".")
        kv.pop(key, None)
        if value is not None:
            kv[key] = value
    return build(kv, tiny_tensors(seed))


def write_tiny_gguf(
    path: Path, *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE, **metadata: Value | None
) -> Path:
    """Writes the tiny model to `path` and returns it; the arguments are those of `tiny_gguf`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny_gguf(seed=seed, chat_template=chat_template, **metadata))
    return path
