"""The header reader: the content of a sound file, and one line for each fault of an unsound one."""

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from emlocal.errors import ModelError
from emlocal.models.gguf import ArrayRef, read_header
from emlocal.models.gguf.types import TENSOR_TYPES
from tests.processor_time import at_most
from tests.tiny_gguf import (
    CHAT_TEMPLATE,
    GGML_Q8_0,
    TOKENS,
    Tensor,
    Value,
    array,
    boolean,
    build,
    f32,
    floats,
    i32,
    ints,
    strings,
    text,
    tiny_gguf,
    tiny_metadata,
    tiny_tensors,
    u16,
    u32,
    write_tiny_gguf,
)


def complaint(path: Path) -> str:
    """Returns the error of `read_header` for the file; always one line, always with a hint."""
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[bytes], str]:
    """Writes the bytes to a file and returns the complaint about it."""

    def check(data: bytes) -> str:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return complaint(path)

    return check


def test_header_of_the_tiny_model(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    header = read_header(path)
    assert (header.architecture, header.name, header.license) == ("llama", "Tiny", "apache-2.0")
    assert (header.context_length, header.embedding_length, header.block_count) == (256, 32, 1)
    assert (header.head_count, header.head_count_kv) == ((4,), (2,))
    assert header.vocab_size == len(TOKENS)
    assert header.chat_template == CHAT_TEMPLATE
    assert header.tool_template is None
    assert header.sampling == {"temperature": 0.5, "top_k": 20}
    assert header.quantization == "F32"
    assert header.file_size == path.stat().st_size
    assert header.files == (path,)
    assert header.array("tokenizer.ggml.tokens") == tuple(TOKENS)
    assert header.array("tokenizer.ggml.token_type")[:4] == (2, 3, 3, 6)
    assert header.weights_bytes == 4 * header.parameters == sum(len(t.data) for t in tiny_tensors())


def test_tensors_lie_where_the_header_says(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    header, data = read_header(path), path.read_bytes()
    for tensor in tiny_tensors():
        info = header.tensors[tensor.name]
        assert (info.shape, info.type, info.file) == (tensor.shape, "F32", path)
        assert data[info.offset : info.offset + info.nbytes] == tensor.data


def test_long_arrays_stay_in_the_file(tmp_path: Path) -> None:
    extra = array(4, struct.pack("<5000I", *range(5000)), 5000)
    header = read_header(write_tiny_gguf(tmp_path / "tiny.gguf", extra__numbers=extra))
    assert isinstance(header.metadata["extra.numbers"], ArrayRef)
    assert header.array("extra.numbers") == tuple(range(5000))


def test_quantization_is_the_heaviest_type_when_the_file_does_not_say(tmp_path: Path) -> None:
    assert read_header(write_tiny_gguf(tmp_path / "m.gguf", general__file_type=None)).quantization == "F32"
    assert (
        read_header(write_tiny_gguf(tmp_path / "m.gguf", general__file_type=u32(15))).quantization == "Q4_K_M"
    )


def test_block_sizes_are_those_of_the_library() -> None:
    """Compares the table with libggml itself, type by type; removed types have a block size of 0 there."""
    import llama_cpp

    library = next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*"))
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_type_size.restype, ggml.ggml_blck_size.restype = ctypes.c_size_t, ctypes.c_int64
    ggml.ggml_type_name.restype = ctypes.c_char_p
    for code in range(43):
        block, size = ggml.ggml_blck_size(code), ggml.ggml_type_size(code)
        name, *ours = TENSOR_TYPES.get(code, ("", 0, 0))
        assert ours == [block, size], code
        assert not block or name.lower() == ggml.ggml_type_name(code).decode().lower()


def test_a_vocabulary_of_151936_tokens_is_read_in_linear_time(tmp_path: Path) -> None:
    tokens = TOKENS + [f"token {i}" for i in range(151_936 - len(TOKENS))]
    tensors = tiny_tensors()
    tensors[0] = Tensor("token_embd.weight", (32, len(tokens)), bytes(34 * len(tokens)), GGML_Q8_0)
    metadata = tiny_metadata() | {
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.scores": floats([0.0] * len(tokens)),
        "tokenizer.ggml.token_type": ints([1] * len(tokens)),
        "tokenizer.ggml.merges": strings([f"{t} x" for t in tokens]),
    }
    path = tmp_path / "large.gguf"
    path.write_bytes(build(metadata, tensors))
    with at_most(20):
        header = read_header(path)
    assert header.vocab_size == 151_936


# --- the container: the kinds of llama.cpp's tests/test-gguf.cpp, and more


def test_no_file(tmp_path: Path) -> None:
    assert "there is no file" in complaint(tmp_path / "nothing.gguf")


def test_a_folder_and_a_device_are_not_read(tmp_path: Path) -> None:
    assert "not a regular file" in complaint(tmp_path)
    assert "not a regular file" in complaint(Path("/dev/zero"))


@pytest.mark.parametrize("size", [0, 1, 23])
def test_too_short_for_any_header(broken: Callable[[bytes], str], size: int) -> None:
    assert f"it has {size} bytes" in broken(tiny_gguf()[:size])


def test_bad_magic(broken: Callable[[bytes], str]) -> None:
    assert 'it starts with "GGML"' in broken(b"GGML" + tiny_gguf()[4:])
    assert r'it starts with "\x1b[2J"' in broken(b"\x1b[2J" + tiny_gguf()[4:]), (
        "no escapes reach the terminal"
    )


@pytest.mark.parametrize(
    ("version", "words"),
    [(0, "version 0"), (1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")],
)
def test_bad_version(broken: Callable[[bytes], str], version: int, words: str) -> None:
    assert words in broken(build(tiny_metadata(), tiny_tensors(), version=version))


def test_version_2_is_read(tmp_path: Path) -> None:
    (tmp_path / "v2.gguf").write_bytes(build(tiny_metadata(), tiny_tensors(), version=2))
    assert read_header(tmp_path / "v2.gguf").version == 2


def test_counts_that_the_file_cannot_hold(broken: Callable[[bytes], str]) -> None:
    for n in (1 << 40, (1 << 64) - 1):
        assert f"declares {n:,} tensors" in broken(build(tiny_metadata(), tiny_tensors(), n_tensors=n))
        assert f"declares {n:,} keys" in broken(build(tiny_metadata(), tiny_tensors(), n_kv=n))


def test_counts_that_are_one_off(broken: Callable[[bytes], str]) -> None:
    n_kv, n_tensors = len(tiny_metadata()), len(tiny_tensors())
    assert "not a usable GGUF file" in broken(build(tiny_metadata(), tiny_tensors(), n_kv=n_kv + 1))
    assert "not a usable GGUF file" in broken(build(tiny_metadata(), tiny_tensors(), n_kv=n_kv - 1))
    assert "not a usable GGUF file" in broken(build(tiny_metadata(), tiny_tensors(), n_tensors=n_tensors + 1))


def test_keys(broken: Callable[[bytes], str]) -> None:
    pairs: list[tuple[str | bytes, Value]] = list(tiny_metadata().items())
    assert "key general.name appears twice" in broken(build([*pairs, ("general.name", text("x"))], []))
    assert "has 0 bytes" in broken(build([("", text("x"))], []))
    assert "not UTF-8" in broken(build([(b"a\xff", text("x"))], []))
    assert "contains a NUL" in broken(build([(b"a\0b", text("x"))], []))
    assert "has 70,000 bytes" in broken(build([("k" * 70_000, text("x"))], []))


def test_lengths_that_point_out_of_the_file(broken: Callable[[bytes], str]) -> None:
    for length in (1 << 20, 1 << 40, (1 << 64) - 1):
        beyond = struct.pack("<Q", length)
        assert f"ends at byte {24 + 9 + 4 + 8 + length:,}" in broken(
            build([("k", (8, beyond)), ("l", u32(0))], [])
        )
        words = broken(build([("k", (9, struct.pack("<IQ", 4, length))), ("l", u32(0))], []))
        assert f"has {length:,} elements, but only" in words
        assert "ends at byte" in broken(struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, length) + bytes(64))
    in_array = struct.pack("<IQQ", 8, 1, 1 << 50)
    assert "ends at byte" in broken(build([("k", (9, in_array)), ("l", u32(0))], []))


def test_value_types(broken: Callable[[bytes], str]) -> None:
    assert "unknown type 13" in broken(build([("k", (13, bytes(64)))], []))
    assert "array of the unknown type 99" in broken(build([("k", array(99, bytes(64), 1))], []))
    assert "array of arrays" in broken(build([("k", array(9, bytes(64), 1))], []))
    assert "boolean of 2" in broken(build([("k", boolean(2)), ("l", u32(0))], []))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (u32(0), "alignment of 0"),
        (u32(33), "alignment of 33"),
        (u32(8), "alignment of 8"),  # llama.cpp asserts that the mapping starts on a multiple of 32
        (u32(1 << 31), "alignment of 2,147,483,648"),
        (i32(32), "not of type uint32"),
        (text("32"), "not of type uint32"),
    ],
)
def test_alignment(broken: Callable[[bytes], str], value: Value, words: str) -> None:
    assert words in broken(tiny_gguf(general__alignment=value))


def test_another_alignment_is_read(tmp_path: Path) -> None:
    metadata = tiny_metadata() | {"general.alignment": u32(128)}
    (tmp_path / "m.gguf").write_bytes(build(metadata, tiny_tensors(), alignment=128))
    assert all(t.offset % 128 == 0 for t in read_header(tmp_path / "m.gguf").tensors.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": ""}, "has 0 bytes"),
        ({"name": "t" * 64}, "has 64 bytes, not 1 to 63"),
        ({"name": "output_norm.weight"}, "tensor output_norm.weight appears twice"),
        ({"shape": (32,), "n_dims": 0}, "has 0 dimensions"),
        ({"shape": (1,) * 5}, "has 5 dimensions"),
        ({"shape": (32, 0)}, "is empty: 32 × 0"),
        ({"shape": (1 << 63, 1 << 63)}, "impossibly large"),
        ({"shape": (1 << 32, 1 << 32)}, "impossibly large"),
        ({"shape": (32, 1 << 40)}, "ends at byte"),
        ({"type": 4}, "unknown type 4"),
        ({"type": 43}, "unknown type 43"),
        ({"type": 8, "shape": (33, 32)}, "has rows of 33, not a multiple of the 32"),
        ({"offset": 1}, "not on a multiple of 32"),
        ({"offset": 0}, "overlaps the one before it"),
        ({"offset": 1 << 30}, "leaves a gap before it"),
        ({"offset": (1 << 64) - 32}, "leaves a gap before it"),
    ],
)
def test_tensors(broken: Callable[[bytes], str], changes: dict[str, object], words: str) -> None:
    tensors = tiny_tensors()
    for field, value in changes.items():
        setattr(tensors[3], field, value)
    assert words in broken(build(tiny_metadata(), tensors))


def test_the_file_ends_early(broken: Callable[[bytes], str], tmp_path: Path) -> None:
    data = tiny_gguf()
    words = broken(data[:-1])
    assert (
        f"blk.0.ffn_down.weight ends at byte {len(data):,} but the file has {len(data) - 1:,} bytes" in words
    )
    header_end = read_header(write_tiny_gguf(tmp_path / "whole.gguf")).data_offset
    for cut in range(24, header_end, 97):
        assert "not a usable GGUF file" in broken(data[:cut])


# --- what llama.cpp makes of it


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", None, "does not say its general.architecture"),
        ("general.architecture", u32(1), "does not say its general.architecture"),
        ("general.architecture", text("ll\x1b[2Jma"), r'general.architecture is "ll\x1b[2Jma"'),
        ("general.architecture", text("clip"), "image projector"),
        ("general.architecture", text("bert"), "does not write text"),
        ("general.type", text("adapter"), "is a LoRA adapter"),
        ("general.type", text("imatrix"), "of kind imatrix"),
        ("llama.block_count", None, "block_count is missing"),
        ("llama.block_count", u32(0), "block_count is 0"),
        ("llama.block_count", u32(513), "block_count is 513"),
        ("llama.nextn_predict_layers", u32(1), "nextn_predict_layers is 1"),
        ("llama.context_length", u32(0), "context_length is 0"),
        ("llama.context_length", f32(256.0), "context_length is 256.0"),
        ("llama.embedding_length", u32(64), "32; the metadata say 294 tokens and embedding_length 64"),
        ("llama.attention.head_count", u32(0), "head_count is 0"),
        ("llama.attention.head_count", u32(3), "3 attention heads for 2 key-value heads"),
        ("llama.attention.head_count_kv", u32(8), "4 attention heads for 8 key-value heads"),
        ("llama.attention.head_count_kv", ints([2, 2]), "head_count_kv has 2 elements for 1 layers"),
        ("llama.attention.key_length", u32(0), "key_length is 0"),
        ("llama.attention.value_length", u32(16), "values of 16"),
        ("llama.rope.dimension_count", u32(7), "an odd number"),
        ("llama.rope.dimension_count", u32(0), "rope.dimension_count is 0"),
        ("llama.rope.dimension_count", u32(64), "rope.dimension_count is 64"),
        ("llama.rope.scaling.type", text("quadratic"), "rope.scaling.type is quadratic"),
        ("llama.rope.freq_base", f32(float("nan")), "rope.freq_base is nan"),
        ("llama.attention.layer_norm_rms_epsilon", f32(-1e-5), "epsilon is -"),
        ("llama.attention.layer_norm_rms_epsilon", f32(float("inf")), "epsilon is inf"),
        ("llama.expert_count", u32(4096), "expert_count is 4096"),
        ("llama.expert_count", u32(4), "of its 4 experts 0 are used"),
        ("llama.expert_used_count", u32(2), "of its 0 experts 2 are used"),
        ("tokenizer.ggml.model", None, "has no tokenizer"),
        ("tokenizer.ggml.model", text("no_vocab"), "tokenizer of kind no_vocab"),
        ("tokenizer.ggml.tokens", strings(TOKENS[:-1]), "the metadata say 293 tokens"),
        ("tokenizer.ggml.tokens", ints([1] * len(TOKENS)), "the metadata say 0 tokens"),
        ("tokenizer.ggml.tokens", strings([*TOKENS[:-1], "▁"]), "token ▁ appears twice"),
        ("tokenizer.ggml.tokens", strings([*TOKENS[:-1], "▁\0x"]), "token ▁ appears twice"),
        ("tokenizer.ggml.tokens", strings(["" if t == "<0x41>" else t for t in TOKENS]), "marked as a byte"),
        ("tokenizer.ggml.tokens", strings([*TOKENS[:3], "<0x-1>", *TOKENS[4:]]), "<0x-1> is marked as"),
        ("tokenizer.ggml.scores", floats([0.0] * 7), "294 tokens but 7 tokenizer.ggml.scores"),
        ("tokenizer.ggml.scores", u32(7), "scores is not an array of float32 or int32"),
        ("tokenizer.ggml.token_type", ints([1] * 7), "294 tokens but 7 tokenizer.ggml.token_type"),
        ("tokenizer.ggml.merges", u32(1), "merges is not an array of string"),
        ("tokenizer.chat_template", text("x" * (1 << 21)), "chat template has 2,097,152 characters"),
        ("split.count", u16(3), "split.count is 3, but it is not named like"),
    ],
)  # fmt: skip
def test_metadata_that_llama_cpp_trips_over(
    broken: Callable[[bytes], str], key: str, value: Value | None, words: str
) -> None:
    assert words in broken(tiny_gguf(**{key.replace(".", "__"): value}))


def test_a_vocabulary_without_a_byte_token_cannot_encode(broken: Callable[[bytes], str]) -> None:
    tokens = ["other" if t == "<0x41>" else t for t in TOKENS]
    assert "no token <0x41>" in broken(
        tiny_gguf(tokenizer__ggml__tokens=strings(tokens), tokenizer__ggml__token_type=None)
    )


def test_a_token_to_add_must_be_in_the_vocabulary(broken: Callable[[bytes], str], tmp_path: Path) -> None:
    gemma = {"tokenizer__ggml__model": text("gemma4"), "tokenizer__ggml__merges": strings(["t h"])}
    assert "bos_token_id is 9999" in broken(tiny_gguf(tokenizer__ggml__bos_token_id=u32(9999), **gemma))
    # The SentencePiece default, token 1, exists, so llama.cpp accepts this file.
    read_header(write_tiny_gguf(tmp_path / "spm.gguf", tokenizer__ggml__bos_token_id=u32(9999)))


@pytest.mark.parametrize(("index", "type_"), [(0, 26), (1, 26), (2, 1), (3, 26), (3, 24)])
def test_weights_of_types_that_cannot_be_multiplied(
    broken: Callable[[bytes], str], index: int, type_: int
) -> None:
    tensors = tiny_tensors()
    name, block_bytes, _ = (tensors[index].name, *TENSOR_TYPES[type_][2:], 0)
    tensors[index].type = type_
    tensors[index].data = tensors[index].data[: len(tensors[index].data) // 4 * block_bytes]
    assert f"tensor {name} is of type {TENSOR_TYPES[type_][0]}" in broken(build(tiny_metadata(), tensors))


def test_a_model_without_tensors_or_embedding(broken: Callable[[bytes], str]) -> None:
    assert "it has no tensors" in broken(build(tiny_metadata(), []))
    assert "no token_embd.weight" in broken(build(tiny_metadata(), tiny_tensors()[1:]))


def test_a_template_of_its_own_for_tools(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tokenizer__chat_template__tool_use=text("U"))
    assert read_header(path).tool_template == "U"
