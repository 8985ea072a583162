"""Adapters that are wrong or hostile: each is refused in one line with its numbers."""

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emlocal.errors import ModelError
from emlocal.models.adapters import read_adapter
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.models.adapters.folders import write_mlx, write_peft
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.gguf import GGUFHeader
from tests.processor_time import at_most
from tests.tiny_gguf import Tensor, Value, adapter_metadata, build, f32, strings, text
from tests.tiny_pair import random_adapter

Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, np.ndarray]
KEY = f"base_model.model.{Q}.lora_A.weight"
KEY_B = f"base_model.model.{Q}.lora_B.weight"


def complaint(path: Path, base: GGUFHeader | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        read_adapter(path, base)
    assert caught.value.message.isprintable(), "one line, no escapes"
    assert caught.value.hint
    return caught.value.message


def weights(
    folder: Path, change: Callable[[Tensors], object], file: str = "adapter_model.safetensors"
) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / file)


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.fixture
def peft(out: Path) -> Path:
    write_peft(random_adapter(), out)
    return out


@pytest.fixture
def mlx(out: Path) -> Path:
    write_mlx(random_adapter(), out)
    return out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(KEY), f"{Q} has a lora_B.weight and no lora_A.weight"),
        (lambda t: t.pop(KEY_B), f"{Q} has a lora_A.weight and no lora_B.weight"),
        (lambda t: t.clear(), "has no tensors"),
        (lambda t: t.update(surprise=np.zeros(3, "f4")), "tensor surprise, which is not half"),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.weight": np.zeros((4, 4), "f4")}),
            "the model's own base_model.model.model.embed_tokens.weight beside LoRA",
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": np.zeros((4, 32), "f4")}), "which is not half"),
        (
            lambda t: t.update({KEY: t[KEY].T}),
            "A of " + Q + " is [32, 4], but adapter_config.json says rank 4",
        ),
        (lambda t: t.update({KEY_B: t[KEY_B][:, :3]}), f"A of {Q} has rank 4, B 3"),
        (lambda t: t.update({KEY: t[KEY][:, 0]}), "is [4], but"),
        (lambda t: t.update({KEY_B: t[KEY_B][None]}), "not matrices"),
        (lambda t: t[KEY].__setitem__((0, 0), np.nan), "infinite or not a number"),
        (lambda t: t[KEY_B].__setitem__((0, 0), -np.inf), "infinite or not a number"),
        (lambda t: t[KEY_B].__setitem__((0, 0), -1e30), "has a weight of 1e+30"),
        (lambda t: t.update({KEY: t[KEY].astype("f2") * np.float16(1e9)}), "infinite or not a number"),
        (lambda t: t.update({KEY: t[KEY].astype("f8")}), "is of type F64, not F32, F16 or BF16"),
        (lambda t: t.update({KEY: t[KEY].astype("i4")}), "is of type I32"),
    ],
)
def test_tensors(peft: Path, change: Callable[[Tensors], object], words: str) -> None:
    with np.errstate(over="ignore"):
        weights(peft, change)
    assert words in complaint(peft)


@pytest.mark.parametrize("name", ["", "a b", "x\x1b[2Jy", "a..b", "../../etc/passwd", "a" * 300, "ä.q_proj"])
def test_names(peft: Path, name: str) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ones((4, 8), "f4")
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ones((8, 4), "f4")

    weights(peft, add)
    assert "is not the name of a layer" in complaint(peft)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 8}, "config.json says rank 8"),
        ({"r": 0}, "config.json says rank 0"),
        ({"r": "absent"}, "config.json says rank 8"),
        ({"r": -4}, "config.json says rank -4"),
        ({"r": "4"}, "r in adapter_config.json is 4, not a number"),
        ({"r": True}, "is True, not a number"),
        ({"r": float("nan")}, "is nan, not a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha in adapter_config.json is inf"),
        ({"lora_alpha": None}, "lora_alpha in adapter_config.json is None"),
        ({"lora_alpha": 1e8}, "the scale of"),
        ({"lora_alpha": 10**400}, "not a number"),
        ({"alpha_pattern": [1]}, "not a table of numbers"),
        ({"alpha_pattern": {"q_proj": "x"}}, "q_proj in adapter_config.json is x"),
        ({"rank_pattern": {"q_proj": 5}}, "says rank 5"),
        ({"peft_type": "absent"}, "adapter_config.json does not say its peft_type"),
        ({"peft_type": "IA3"}, "the method IA3"),
        ({"use_future": True}, "uses use_future"),
        ({"fan_in_fan_out": True}, "transposed layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa_niter_4"),
    ],
)
def test_configurations(peft: Path, fields: dict[str, Any], words: str) -> None:
    configure(peft, **fields)
    assert words in complaint(peft)


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(.*)*x", ".*.*.*.*=", "(?=x)", "((a|a))+", "[", "q{1,99}", "(q)\\1"]
)
def test_a_pattern_cannot_hold_up_the_reader(peft: Path, pattern: str) -> None:
    configure(peft, alpha_pattern={pattern: 3})
    with at_most(10):
        assert "which is not a valid pattern" in complaint(peft)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_configuration(peft: Path, raw: bytes) -> None:
    (peft / "adapter_config.json").write_bytes(raw)
    assert "adapter_config.json is not" in complaint(peft)


def test_missing_files(peft: Path, tmp_path: Path) -> None:
    (peft / "adapter_config.json").unlink()
    assert "cannot read" in complaint(peft)
    assert "there is no adapter" in complaint(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is a pipe or a device, not an adapter" in complaint(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    assert "neither adapter_model.safetensors (PEFT)" in complaint(tmp_path / "empty")
    assert "is one file of an adapter" in complaint(peft / "adapter_model.safetensors")
    (tmp_path / "empty" / "adapters.npz").write_bytes(b"")
    assert "pickles can run code" in complaint(tmp_path / "empty")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:100],
        lambda data: b"",
        lambda data: struct.pack("<Q", 1 << 62) + data[8:],
        lambda data: struct.pack("<Q", 200_000_000) + data[8:],
    ],
)
@pytest.mark.parametrize("form", ["peft", "mlx"])
def test_a_damaged_file(request: pytest.FixtureRequest, form: str, damage: Callable[[bytes], bytes]) -> None:
    folder: Path = request.getfixturevalue(form)
    path = folder / ("adapter_model.safetensors" if form == "peft" else "adapters.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    assert "is not a usable safetensors file" in complaint(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fine_tune_type": "dora"}, "uses DoRA"),
        ({"fine_tune_type": "full"}, "fine_tune_type = full"),
        ({"lora_parameters": "absent"}, "no number lora_parameters.scale"),
        ({"lora_parameters": {"rank": 4}}, "no number lora_parameters.scale"),
        ({"lora_parameters": {"scale": True}}, "no number lora_parameters.scale"),
        ({"lora_parameters": {"scale": float("nan")}}, "the scale of"),
        ({"lora_parameters": {"scale": 1e300}}, "the scale of"),
    ],
)
def test_mlx_configurations(mlx: Path, fields: dict[str, Any], words: str) -> None:
    configure(mlx, **fields)
    assert words in complaint(mlx)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.embed_tokens", (32, 4), "LoRA on embeddings"),
        ("model.layers.0.mlp.experts", (2, 32, 4), "not matrices"),
    ],
)
def test_mlx_layers_that_are_no_matrices(mlx: Path, name: str, shape: tuple[int, ...], words: str) -> None:
    def add(tensors: Tensors) -> None:
        tensors[f"{name}.lora_a"] = tensors[f"{name}.lora_b"] = np.zeros(shape, "f4")

    weights(mlx, add, "adapters.safetensors")
    assert words in complaint(mlx)


def test_dora_of_mlx(mlx: Path) -> None:
    weights(mlx, lambda t: t.update({f"{Q}.m": np.zeros(32, "f4")}), "adapters.safetensors")
    assert f"tensor {Q}.m, which is not half" in complaint(mlx)


def gguf(path: Path, tensors: dict[str, tuple[int, ...]], **changes: Value | None) -> Path:
    data = [Tensor(n, s, np.full(s, 0.5, "<f4").tobytes()) for n, s in tensors.items()]
    path.write_bytes(build(adapter_metadata(**changes), data))
    return path


GOOD = {"blk.0.attn_v.weight.lora_a": (32, 4), "blk.0.attn_v.weight.lora_b": (4, 16)}


@pytest.mark.parametrize(
    ("tensors", "changes", "words"),
    [
        ({}, {}, "it changes no tensor"),
        (
            GOOD | {"token_embd.weight.lora_a": (4, 9), "token_embd.weight.lora_b": (4, 9)},
            {},
            "on embeddings",
        ),
        (GOOD | {"output_norm.weight": (32,)}, {}, "weights beside LoRA (output_norm.weight)"),
        ({k.replace("attn_v", "ssm_in"): v for k, v in GOOD.items()}, {}, "LoRA on blk.0.ssm_in.weight"),
        ({k.replace("blk.0", "blk.99999"): v for k, v in GOOD.items()}, {}, "it changes layer 99,999"),
        ({k.replace("blk.0", "blk.x"): v for k, v in GOOD.items()}, {}, "LoRA on blk.x.attn_v.weight"),
        ({k.replace("blk.0", "blk.7"): v for k, v in GOOD.items()}, {}, "does not have"),
        (
            GOOD,
            {"general__architecture": text("qwen2")},
            "is for the architecture qwen2, llama.gguf is llama",
        ),
        (GOOD, {"general__architecture": text("mamba")}, "for the architecture mamba"),
        (GOOD, {"general__architecture": None}, "for the architecture"),
        (GOOD, {"general__type": text("model")}, "general.type is model, not adapter"),
        (GOOD, {"adapter__alora__invocation_tokens": strings(["a"])}, "activated LoRA"),
        (GOOD, {"adapter__lora__alpha": f32(float("nan"))}, "alpha is nan"),
        (GOOD, {"adapter__lora__alpha": f32(1e30)}, "the scale of"),
        ({"blk.0.attn_v.weight.lora_a": (32, 4), "blk.0.attn_v.weight.lora_b": (5, 16)}, {}, "rank 4, B 5"),
        ({"blk.0.attn_v.weight.lora_a": (32, 4), "blk.0.attn_v.weight.lora_b": (4, 32)}, {}, "is 32 × 32"),
    ],
)
def test_gguf_files(
    tmp_path: Path,
    base: GGUFHeader,
    tensors: dict[str, tuple[int, ...]],
    changes: dict[str, Value | None],
    words: str,
) -> None:
    assert words in complaint(gguf(tmp_path / "a.gguf", tensors, **changes), base)


def test_a_truncated_gguf_and_a_model(tmp_path: Path, base: GGUFHeader) -> None:
    path = gguf(tmp_path / "a.gguf", GOOD)
    path.write_bytes(path.read_bytes()[:-1])
    assert "but the file has" in complaint(path, base)
    assert "is not a LoRA adapter: its general.type is None" in complaint(base.path, base)


@pytest.mark.parametrize(
    ("name", "out", "inner", "words"),
    [
        (Q, 64, 32, f"does not fit llama.gguf: its {Q} is 64 × 32, the model's 32 × 32"),
        (Q, 32, 64, "is 32 × 64, the model's 32 × 32"),
        (
            "model.layers.2.self_attn.q_proj",
            32,
            32,
            "model.layers.2.self_attn.q_proj, which llama.gguf does not",
        ),
        ("model.layers.0.mlp.experts.3.w1", 32, 32, "which llama.gguf does not have"),
        ("model.embed_tokens", 294, 32, "which llama.gguf does not have"),
    ],
)
def test_an_adapter_for_another_model(
    tmp_path: Path, base: GGUFHeader, name: str, out: int, inner: int, words: str
) -> None:
    adapter = Adapter({name: LoraPair(np.ones((4, inner), "f4"), np.ones((out, 4), "f4"), 1.0)})
    write_peft(adapter, tmp_path / "a")
    assert words in complaint(tmp_path / "a", base)
    with pytest.raises(ModelError, match="adapter"):
        write_gguf(adapter, tmp_path / "a.gguf", base)
    assert not (tmp_path / "a.gguf").exists()


def test_an_architecture_that_is_not_known(tmp_path: Path, base: GGUFHeader) -> None:
    other = replace(base, metadata=dict(base.metadata) | {"general.architecture": "internlm2"})
    with pytest.raises(ModelError, match="for the architecture internlm2"):
        write_gguf(random_adapter(), tmp_path / "a.gguf", other)


def test_scales_too_far_apart(tmp_path: Path) -> None:
    huge = LoraPair(np.ones((2, 4), "f4"), np.full((4, 2), 3e38, "f4"), 1e6)
    small = LoraPair(np.ones((2, 4), "f4"), np.ones((4, 2), "f4"), 1e-6)
    adapter = Adapter({"a": small, "b": small, "c": huge})
    with pytest.raises(ModelError, match=r"the scale of c, 1e\+06"):
        write_mlx(adapter, tmp_path / "mlx")
    assert list(tmp_path.iterdir()) == []
