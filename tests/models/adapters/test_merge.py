"""A merged model folder gives the logits of the model with the adapter, in the model's own types."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from emlocal.errors import EmlocalError, ModelError
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.models.adapters.merge import merge, open_model
from emlocal.models.safetensors import narrowed, read_safetensors_header, widened
from tests.tiny_pair import ModelPair, random_adapter

IDS = [[1, 70, 45, 200, 261, 33, 90, 12]]


def logits(folder: Path, adapter: Adapter | None = None, dtype: Any = None) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    from emlocal.backends.torch.model import attach

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32).eval()
    if adapter is not None:
        attach(model, adapter)
    with torch.no_grad():
        rows: np.ndarray = model(torch.tensor(IDS)).logits.float().numpy()
    return rows


def saved(pair: ModelPair, folder: Path, dtype: Any, shard: str = "5GB") -> Path:
    """Saves the model in another type, in shards of this size."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


def test_a_merged_model_computes_the_same(any_pair: ModelPair, out: Path) -> None:
    adapter = random_adapter(mixed=True, scale=0.5)
    merge(adapter, 1.0, open_model(any_pair.folder), out)
    wanted = logits(any_pair.folder, adapter)
    assert np.abs(wanted - logits(any_pair.folder)).max() > 0.5
    assert np.abs(logits(out) - wanted).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_and_types_stay(any_pair: ModelPair, tmp_path: Path, out: Path, dtype: Any) -> None:
    folder = saved(any_pair, tmp_path / "model", dtype, shard="20KB")
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    assert len(files) > 2
    adapter = random_adapter()
    merge(adapter, -0.5, open_model(folder), out)
    assert sorted(p.name for p in out.glob("*.safetensors")) == files
    for name in files:
        before, after = read_safetensors_header(folder / name), read_safetensors_header(out / name)
        assert before.tensors == after.tensors
        assert before.metadata == after.metadata
    kept = {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors.index.json"}
    assert {p.name for p in out.iterdir()} - set(files) == kept
    from safetensors.torch import load_file as load_torch

    for name in files:
        for key, w in load_torch(folder / name).items():
            after = load_torch(out / name)[key]
            layer = adapter.pairs.get(key.removesuffix(".weight"))
            if layer is None:
                assert torch.equal(after, w)
                continue
            exact = w.float() - 0.5 * layer.scale * torch.from_numpy(layer.b @ layer.a)
            rounded = exact.to(dtype)
            # sums in another order may round a tie differently
            assert (after == rounded).float().mean() > 0.99
            assert (after.float() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_large_matrices_go_block_by_block(
    pair: ModelPair, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emlocal.models.adapters import merge as module

    # five rows of 32, so blocks do not divide the rows evenly
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4 * 32 * 5)
    merge(random_adapter(), 1.0, open_model(pair.folder), out)
    assert np.abs(logits(out) - logits(pair.folder, random_adapter())).max() < 1e-4


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_is_torchs(dtype: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-45, 65519.9, 65520.0, 1.00390625]
    values = np.concatenate([bits, np.array(odd, np.float32).view(np.uint32)]).view(np.float32)
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    wanted = torch.from_numpy(values).to(kind).float().numpy()
    found = widened(narrowed(values, dtype), dtype)
    np.testing.assert_array_equal(found, wanted)


def test_what_does_not_fit_leaves_nothing(pair: ModelPair, out: Path, tmp_path: Path) -> None:
    wrong = Adapter(
        {"model.layers.0.mlp.up_proj": LoraPair(np.ones((2, 64), "f4"), np.ones((32, 2), "f4"), 1)}
    )
    with pytest.raises(ModelError, match="32 × 64, the model's 64 × 32"):
        merge(wrong, 1.0, open_model(pair.folder), out)
    huge = Adapter(
        {"model.layers.0.mlp.up_proj": LoraPair(np.ones((2, 32), "f4"), np.ones((64, 2), "f4"), 1e6)}
    )
    half = saved(pair, tmp_path / "half", torch.float16)
    with pytest.raises(ModelError, match="weights too large for F16"):
        merge(huge, 1.0, open_model(half), out)
    assert not out.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"half"}


def test_an_existing_folder_is_refused(pair: ModelPair, out: Path) -> None:
    out.mkdir()
    with pytest.raises(EmlocalError, match="exists already"):
        merge(random_adapter(), 1.0, open_model(pair.folder), out)
    assert list(out.iterdir()) == []


def test_a_tied_output_matrix_is_not_merged_into(tmp_path: Path, out: Path) -> None:
    from tests.tiny_pair import write_pair

    folder = write_pair(tmp_path, "qwen2").folder
    head = Adapter({"lm_head": LoraPair(np.ones((2, 32), "f4"), np.ones((294, 2), "f4"), 1)})
    with pytest.raises(ModelError, match="shares with its embeddings"):
        merge(head, 1.0, open_model(folder), out)


def test_quantized_weights_are_refused(pair: ModelPair, tmp_path: Path, out: Path) -> None:
    folder = tmp_path / "quantized"
    shutil.copytree(pair.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((64, 32), np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match="is of type I8"):
        merge(random_adapter(), 1.0, open_model(folder), out)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../../model.safetensors"}}, "is not a table of files"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "is not a table of files"),
        ({"weight_map": {"a": "model.bin"}}, "is not a table of files"),
        ({"weight_map": {}}, "is not a table of files"),
        ({"weight_map": 3}, "is not a table of files"),
        ([], "is not a table of files"),
        ({"weight_map": {"a": "model.safetensors"}}, "says that a is in model.safetensors"),
        ({"weight_map": {"a": "other.safetensors"}}, "cannot read"),
    ],
)
def test_an_index_that_lies(pair: ModelPair, tmp_path: Path, index: object, words: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pair.folder, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=words):
        open_model(folder)


def test_a_full_disk_is_said_before(pair: ModelPair, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ModelError, match=r"the merged model out needs \d+ kB of disk, but .* has 1 kB free"):
        merge(random_adapter(), 1.0, open_model(pair.folder), out)
    assert list(out.parent.iterdir()) == []
