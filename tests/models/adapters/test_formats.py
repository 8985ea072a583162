"""An adapter written in one format reads back the same, and passes through all formats unchanged."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emlocal.models.adapters import as_gguf, format_of, read_adapter
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.adapters.folders import write_mlx, write_peft
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.gguf import GGUFHeader, read_adapter_header, read_header
from tests.tiny_pair import ModelPair, assert_same, random_adapter


@pytest.mark.parametrize("mixed", [False, True])
def test_peft(out: Path, mixed: bool) -> None:
    adapter = random_adapter(mixed=mixed)
    write_peft(adapter, out)
    assert format_of(out) == "peft"
    assert_same(read_adapter(out), adapter)
    config = json.loads((out / "adapter_config.json").read_text())
    assert bool(config["alpha_pattern"]) == bool(config["rank_pattern"]) == mixed
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_peft_names_layers_where_not_all_are_adapted(out: Path) -> None:
    adapter = random_adapter()
    some = Adapter({n: p for n, p in adapter.pairs.items() if n.startswith("model.layers.1.self")}, "")
    write_peft(some, out)
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == sorted(some.pairs)
    assert_same(read_adapter(out), some)


def test_mlx(out: Path) -> None:
    adapter = random_adapter()
    write_mlx(adapter, out)
    assert format_of(out) == "mlx"
    assert_same(read_adapter(out), adapter)
    tensors = load_file(out / "adapters.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.lora_a"].shape == (64, 4)
    assert tensors["model.layers.0.mlp.down_proj.lora_b"].shape == (4, 32)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == -1
    assert config["lora_parameters"]["rank"] == 4
    assert config["lora_parameters"]["scale"] == 2.0
    assert "mlp.down_proj" in config["lora_parameters"]["keys"]


def test_mlx_of_mixed_ranks_and_scales(out: Path) -> None:
    adapter = random_adapter(mixed=True)
    write_mlx(adapter, out)
    assert_same(read_adapter(out), adapter, exactly=False)
    assert {p.rank for p in read_adapter(out).pairs.values()} == {6}


@pytest.mark.parametrize("mixed", [False, True])
def test_gguf(tmp_path: Path, any_pair: ModelPair, mixed: bool) -> None:
    adapter, base, path = random_adapter(mixed=mixed), read_header(any_pair.gguf), tmp_path / "a.gguf"
    write_gguf(adapter, path, base)
    assert format_of(path) == "gguf"
    assert read_adapter_header(path, base).metadata["general.type"] == "adapter"
    assert_same(read_adapter(path, base), adapter, exactly=not mixed)


@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.0, 2.0), (-2.0, 3.0), (1e-3, 1e3)])
def test_odd_scales_mean_the_same_everywhere(
    tmp_path: Path, base: GGUFHeader, scales: tuple[float, float]
) -> None:
    """An alpha of 0 in a GGUF file would mean a scale of 1."""
    pairs = list(random_adapter().pairs.items())[:2]
    adapter = Adapter({n: replace(p, scale=s) for (n, p), s in zip(pairs, scales, strict=True)})
    write_gguf(adapter, tmp_path / "a.gguf", base)
    assert_same(read_adapter(tmp_path / "a.gguf", base), adapter, exactly=False)
    write_mlx(adapter, tmp_path / "mlx")
    assert_same(read_adapter(tmp_path / "mlx"), adapter, exactly=False)
    write_peft(adapter, tmp_path / "peft")
    assert_same(read_adapter(tmp_path / "peft"), adapter, exactly=False)


def test_all_the_way_round(tmp_path: Path, any_pair: ModelPair) -> None:
    adapter, base = random_adapter(rank=3, scale=20.0), read_header(any_pair.gguf)
    write_peft(adapter, tmp_path / "peft")
    write_gguf(read_adapter(tmp_path / "peft"), tmp_path / "a.gguf", base)
    write_mlx(read_adapter(tmp_path / "a.gguf", base), tmp_path / "mlx")
    assert_same(read_adapter(tmp_path / "mlx", base), adapter)


def test_gguf_of_the_llama_family_needs_the_base(tmp_path: Path, any_pair: ModelPair) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(random_adapter(), path, read_header(any_pair.gguf))
    if any_pair.gguf.stem == "qwen2":
        assert_same(read_adapter(path), random_adapter())
    else:
        from emlocal.errors import ModelError

        with pytest.raises(ModelError, match="number of heads") as caught:
            read_adapter(path)
        assert caught.value.hint.startswith("give the base model too: --base MODEL")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_read_exactly(out: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    adapter = random_adapter()
    write_peft(adapter, out)
    path = out / "adapter_model.safetensors"
    halves = {n: torch.from_numpy(t).to(getattr(torch, dtype)) for n, t in load_file(path).items()}
    save_torch(halves, path)
    pair = read_adapter(out).pairs["model.layers.1.mlp.up_proj"]
    stored = halves["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].float().numpy()
    assert pair.b.dtype == np.float32
    assert np.array_equal(pair.b, stored)


def test_a_quantized_gguf_adapter_is_dequantized(tmp_path: Path, base: GGUFHeader) -> None:
    """llama.cpp's converter writes such adapters with --outtype q8_0."""
    import gguf

    rng, path = np.random.default_rng(0), tmp_path / "a.gguf"
    a, b = rng.normal(size=(32, 32)).astype("f4"), rng.normal(size=(16, 32)).astype("f4")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in (("lora_a", a), ("lora_b", b)):
        writer.add_tensor(f"blk.0.attn_v.weight.{name}", gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    pair = read_adapter(path, base).pairs["model.layers.0.self_attn.v_proj"]
    assert pair.scale == 1.0  # there is no alpha
    assert np.abs(pair.a - a).max() < 0.02
    assert np.abs(pair.b - b).max() < 0.02


def test_a_folder_with_both_is_pefts(out: Path) -> None:
    write_peft(random_adapter(), out)
    save_file({"x.lora_a": np.ones((2, 2), "f4")}, out / "adapters.safetensors")
    assert_same(read_adapter(out), random_adapter())


def test_as_gguf_leaves_nothing_behind(out: Path, base: GGUFHeader) -> None:
    write_peft(random_adapter(), out)
    with as_gguf(out, base) as file:
        assert file.stat().st_mode & 0o700
        assert file.parent.stat().st_mode & 0o077 == 0, "nobody else may look"
        assert_same(read_adapter(file, base), random_adapter())
    assert not file.exists()
    assert not file.parent.exists()
