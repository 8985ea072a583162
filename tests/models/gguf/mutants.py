"""Broken copies of the tiny model, determined by the seed: broken at random bytes, and at weak points."""

import random
import struct

from emlocal.models.gguf.keys import CHECKED
from tests.tiny_architectures import (
    ARCHITECTURES,
    architecture_metadata,
    architecture_tensors,
    general_architecture,
)
from tests.tiny_gguf import (
    F32,
    I32,
    U32,
    Tensor,
    Value,
    build,
    floats,
    ints,
    strings,
    text,
    tiny_gguf,
    tiny_metadata,
    tiny_tensors,
)

NUMBERS = [0, 1, 2, 3, 5, 7, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 294, 511, 513, 1 << 16]
NUMBERS += [(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
FLOATS = [0.0, -0.0, -1.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan"), 0.5, 1e6]
HEADER_BYTES = len(tiny_gguf()) - sum(len(t.data) for t in tiny_tensors())
# Keys that llama.cpp reads for some architectures, although the tiny models do not need them.
MORE_KEYS = [
    *sorted(f"llama.{name}" for name in set().union(*CHECKED.values())),
    "llama.attention.clamp_kqv",
    "llama.attention.max_alibi_bias",
    "llama.attention.scale",
    "llama.logit_scale",
    "llama.residual_scale",
    "llama.embedding_scale",
    "llama.use_parallel_residual",
    "llama.tensor_data_layout",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.seperator_token_id",
    "tokenizer.ggml.mask_token_id",
    "tokenizer.ggml.fim_pre_token_id",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.remove_extra_whitespaces",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_sep_token",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.token_type_count",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.suppress_tokens",
    "split.count",
    "split.no",
    "general.alignment",
    "general.quantization_version",
]
OTHER_ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "mamba",
    "falcon",
    "starcoder2",
]
TOKENIZERS = ["llama", "gpt2", "gemma4", "rwkv", "plamo2", "bert", "t5", "none", "test"]


def mutant(seed: int) -> bytes:
    """Returns the mutant of this number. Two of five have broken bytes, the others broken values.

    Half have the llama architecture with a SentencePiece vocabulary, the others another one with BPE.
    """
    rng = random.Random(seed)
    metadata, tensors = tiny_metadata(), tiny_tensors()
    if seed % 2:
        architecture = ARCHITECTURES[seed // 2 % len(ARCHITECTURES)]
        metadata, tensors = architecture_metadata(architecture), architecture_tensors(architecture)
        architecture = general_architecture(architecture)
    else:
        architecture = "llama"
    if rng.random() < 0.5 or seed % 5 >= 2:
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.75:
                _change_metadata(rng, metadata, architecture)
            else:
                _change_tensor(rng, tensors)
    data = bytearray(build(metadata, tensors))
    if seed % 5 < 2:
        for _ in range(rng.randint(1, 3)):
            rng.choice(_BYTE_LEVEL)(rng, data)
    return bytes(data)


def _change_metadata(rng: random.Random, metadata: dict[str, Value], architecture: str) -> None:
    key = rng.choice([*metadata, *MORE_KEYS]).replace("llama.", f"{architecture}.", 1)
    kind, payload = metadata.get(key, (U32, struct.pack("<I", 0)))
    roll = rng.random()
    if roll < 0.1:
        metadata.pop(key, None)
    elif key == "general.architecture":
        other = rng.choice(OTHER_ARCHITECTURES)
        for old in [k for k in metadata if k.startswith(f"{architecture}.")]:
            metadata[other + old.removeprefix(architecture)] = metadata.pop(old)
        metadata[key] = text(other)
    elif key == "tokenizer.ggml.model":
        metadata[key] = text(rng.choice(TOKENIZERS))
        metadata["tokenizer.ggml.merges"] = strings(["t h", "a  b", " ", ""])
    elif kind == F32 and roll < 0.8:
        metadata[key] = (F32, struct.pack("<f", rng.choice(FLOATS)))
    elif kind in (U32, I32) and roll < 0.8:
        metadata[key] = (kind, struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF))
    elif roll < 0.9:
        other = [
            floats([1.0] * rng.choice([1, 2, 294])),
            ints([rng.choice([0, 1, 6, -1])] * rng.choice([1, 294])),
        ]
        metadata[key] = rng.choice([*other, text("x"), strings(["a", "b"]), (rng.randrange(14), bytes(16))])
    else:
        metadata[key] = (kind, bytes(b if rng.random() < 0.99 else rng.randrange(256) for b in payload))


def _change_tensor(rng: random.Random, tensors: list[Tensor]) -> None:
    tensor = rng.choice(tensors)
    roll = rng.random()
    if roll < 0.2:
        tensors.remove(tensor)
    elif roll < 0.5:
        tensor.type = rng.randrange(44)
    elif roll < 0.7:
        tensor.shape = tuple(rng.choice([*tensor.shape, *NUMBERS]) for _ in range(rng.randint(1, 4)))
        if rng.random() < 0.7:  # an honest amount of data, so that only the shape lies
            size = 4
            for d in tensor.shape:
                size *= d
            tensor.data = bytes(size) if size < 1 << 18 else tensor.data
    elif roll < 0.8:
        tensor.shape = tensor.shape[::-1]
    elif roll < 0.9:
        tensor.name = rng.choice(
            [t.name for t in tensors] + ["rope_freqs.weight", "blk.0.attn_q.bias", "output.weight"]
        )
    else:
        fill = rng.choice([0x00, 0xFF, 0x7F])
        tensor.data = bytes([fill]) * len(
            tensor.data
        )  # NaN, zero and huge weights must not crash the process either


def _flip(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(min(HEADER_BYTES, len(data)))] = rng.randrange(256)


def _number(rng: random.Random, data: bytearray) -> None:
    size, letter = rng.choice([(4, "<I"), (8, "<Q")])
    at = rng.randrange(min(HEADER_BYTES, len(data)) - size)
    struct.pack_into(letter, data, at, rng.choice(NUMBERS) & ((1 << 8 * size) - 1))


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(24, len(data)) :]


def _remove(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(24, min(HEADER_BYTES, len(data)))
    del data[at : at + rng.randint(1, 32)]


def _repeat(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(24, min(HEADER_BYTES, len(data)))
    data[at:at] = data[at : at + rng.randint(1, 64)]


_BYTE_LEVEL = (_flip, _flip, _flip, _number, _number, _cut, _remove, _repeat)
