"""GGUF LoRA adapters: those that fit the base model are read, all others are refused in one line."""

import struct
from pathlib import Path

import numpy as np
import pytest

from emlocal.errors import ModelError
from emlocal.models.gguf import GGUFHeader, read_adapter_header, read_header
from tests.tiny_gguf import Tensor, Value, adapter_metadata, build, f32, text, u32, write_tiny_gguf

NAME = "blk.0.attn_q.weight"
RANK = 4


@pytest.fixture
def base(tmp_path: Path) -> GGUFHeader:
    return read_header(write_tiny_gguf(tmp_path / "base.gguf"))


def factor(name: str, *shape: int, value: float = 0.5, dtype: str = "<f4", type_: int = 0) -> Tensor:
    return Tensor(name, shape, np.full(int(np.prod(shape)), value, dtype).tobytes(), type_)


def pair(name: str = NAME, inner: int = 32, outer: int = 32, rank: int = RANK) -> list[Tensor]:
    return [factor(f"{name}.lora_a", inner, rank), factor(f"{name}.lora_b", rank, outer)]


def complaint(path: Path, base: GGUFHeader, kv: dict[str, Value], tensors: list[Tensor]) -> str:
    path.write_bytes(build(kv, tensors))
    with pytest.raises(ModelError) as caught:
        read_adapter_header(path, base)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_an_adapter_that_fits(tmp_path: Path, base: GGUFHeader) -> None:
    half = [factor("output_norm.weight", 32), *pair("token_embd.weight", rank=RANK, inner=32, outer=32)[:0]]
    embedding = [factor("token_embd.weight.lora_a", RANK, 294), factor("token_embd.weight.lora_b", RANK, 32)]
    f16 = [
        factor("blk.0.ffn_up.weight.lora_a", 32, 2, dtype="<f2", type_=1),
        factor("blk.0.ffn_up.weight.lora_b", 2, 64),
    ]
    path = tmp_path / "adapter.gguf"
    path.write_bytes(build(adapter_metadata(), [*pair(), *embedding, *f16, *half]))
    header = read_adapter_header(path, base)
    assert header.metadata["adapter.lora.alpha"] == 8.0
    assert len(header.tensors) == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general__type": None}, "general.type is None, not adapter"),
        ({"general__type": text("model")}, "general.type is model, not adapter"),
        ({"general__type": u32(1)}, "general.type is 1, not adapter"),
        ({"adapter__type": text("dora")}, "adapter.type is dora, not lora"),
        ({"general__architecture": text("qwen2")}, "general.architecture is qwen2, not llama"),
        ({"adapter__lora__alpha": u32(8)}, "alpha is not of type float32"),
        ({"adapter__lora__alpha": f32(float("nan"))}, "alpha is nan"),
        ({"adapter__lora__alpha": f32(float("inf"))}, "alpha is inf"),
    ],
)
def test_adapter_metadata(
    tmp_path: Path, base: GGUFHeader, changes: dict[str, Value | None], words: str
) -> None:
    assert words in complaint(tmp_path / "a.gguf", base, adapter_metadata(**changes), pair())


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([], "it changes no tensor"),
        (pair()[:1], f"{NAME} has no .lora_b"),
        (pair()[1:], f"{NAME} has no .lora_a"),
        ([factor("extra.weight", 32, 32)], "extra.weight has neither"),
        (pair("blk.7.attn_q.weight"), "it changes blk.7.attn_q.weight, which base.gguf does not have"),
        (pair(inner=64), f"factors of {NAME} make 64 × 32, but the model has 32 × 32"),
        (pair(outer=64), "make 32 × 64, but the model has 32 × 32"),
        ([pair(rank=2)[0], pair(rank=4)[1]], "have ranks 2 and 4"),
        (pair(rank=5000), "have ranks 5,000 and 5,000"),
        ([factor(f"{NAME}.lora_a", 32), factor(f"{NAME}.lora_b", 1, 32)], "is not a matrix"),
        ([factor(f"{NAME}.lora_a", 32, 4, type_=26), pair()[1]], "is of type I32"),
        ([factor(f"{NAME}.lora_a", 32, 4, value=float("nan")), pair()[1]], "infinite or not a number"),
        ([pair()[0], factor(f"{NAME}.lora_b", 4, 32, value=float("inf"))], "infinite or not a number"),
        (
            [factor(f"{NAME}.lora_a", 32, 4, value=np.inf, dtype="<f2", type_=1), pair()[1]],
            "infinite or not a number",
        ),
    ],
)
def test_tensors(tmp_path: Path, base: GGUFHeader, tensors: list[Tensor], words: str) -> None:
    assert words in complaint(tmp_path / "a.gguf", base, adapter_metadata(), tensors)


def test_the_container_is_checked_first(tmp_path: Path, base: GGUFHeader) -> None:
    path = tmp_path / "a.gguf"
    data = build(adapter_metadata(), pair())
    path.write_bytes(data[:-1])
    with pytest.raises(ModelError, match="but the file has"):
        read_adapter_header(path, base)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 1))
    with pytest.raises(ModelError, match="declares"):
        read_adapter_header(path, base)


@pytest.mark.real
def test_llama_cpp_takes_the_adapter(tmp_path: Path, base: GGUFHeader) -> None:
    import llama_cpp

    path = tmp_path / "adapter.gguf"
    path.write_bytes(build(adapter_metadata(), pair()))
    read_adapter_header(path, base)
    model = llama_cpp.llama_model_load_from_file(
        str(base.path).encode(), llama_cpp.llama_model_default_params()
    )
    assert model
    assert llama_cpp.llama_adapter_lora_init(model, str(path).encode())
