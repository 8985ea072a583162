"""Adapters in the torch engine, compared with llama.cpp and with the merged model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from emlocal.backends.base import Backend, Feed, LoadOptions
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.backends.torch import backend
from emlocal.backends.torch.backend import open_folder
from emlocal.backends.torch.model import attach, load_model, lora_layers, skeleton
from emlocal.errors import ModelError
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.models.adapters.folders import write_mlx, write_peft
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.adapters.merge import merge
from emlocal.models.adapters.merge import open_model as open_files
from emlocal.models.gguf import read_header
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.models.unpacked import unpack
from tests.tiny_pair import ModelPair, random_adapter

TOLERANCE = 1e-4
TOKENS = [1, 70, 45, 200, 261, 33, 90, 12, 150, 7]
Adapters = Sequence[tuple[Path, float]]


@pytest.fixture(scope="module")
def gguf(any_pair: ModelPair) -> GGUFModel:
    """A tiny GGUF model of F32 weights."""
    return resolve(str(any_pair.gguf))


@pytest.fixture(scope="module")
def folder(gguf: GGUFModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, unpacked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return unpack(gguf)


def logits(engine: Backend) -> NDArray[np.float32]:
    """Returns the logits [V] after TOKENS, in two feeds."""
    sequence = engine.open()
    engine.forward([Feed(sequence, TOKENS[:-1], wanted=False)])
    engine.forward([Feed(sequence, TOKENS[-1:])])
    row = engine.logits(sequence)
    engine.close()
    return row


def in_torch(folder: Path, adapters: Adapters = (), base: GGUFModel | None = None) -> NDArray[np.float32]:
    options = LoadOptions(context=64, sequences=1, threads=1, adapters=tuple(adapters))
    header = None if base is None else base.header
    return logits(open_folder(folder, options, base=header, device="cpu", dtype="float32"))


def in_llama_cpp(model: GGUFModel, adapters: Adapters) -> NDArray[np.float32]:
    options = LoadOptions(context=64, sequences=1, threads=1, kv_type="f32", adapters=tuple(adapters))
    return logits(LlamaCppBackend(model, options))


def two(tmp_path: Path, gguf: GGUFModel) -> list[tuple[Path, float]]:
    """Two adapters in two formats, with different scales."""
    write_peft(random_adapter(mixed=True, scale=1.0), tmp_path / "one")
    write_gguf(random_adapter(rank=3, scale=0.5, seed=9), tmp_path / "other.gguf", gguf.header)
    return [(tmp_path / "one", 0.7), (tmp_path / "other.gguf", -1.3)]


@pytest.mark.real
@pytest.mark.usefixtures("no_flash_attention")
@pytest.mark.parametrize("form", ["peft", "mlx", "gguf"])
def test_one_adapter_is_what_llama_cpp_computes(
    tmp_path: Path, gguf: GGUFModel, folder: Path, form: str
) -> None:
    adapter, path = random_adapter(mixed=True, scale=1.0), tmp_path / "adapter"
    if form == "gguf":
        write_gguf(adapter, path, gguf.header)
    else:
        (write_peft if form == "peft" else write_mlx)(adapter, path)
    ours = in_torch(folder, [(path, 0.7)], gguf)
    assert np.abs(ours - in_torch(folder)).max() > 0.5
    assert np.abs(ours - in_llama_cpp(gguf, [(path, 0.7)])).max() < TOLERANCE


@pytest.mark.real
@pytest.mark.usefixtures("no_flash_attention")
def test_two_adapters_at_once_are_what_llama_cpp_computes(
    tmp_path: Path, gguf: GGUFModel, folder: Path
) -> None:
    both = two(tmp_path, gguf)
    ours = in_torch(folder, both, gguf)
    for alone in both:
        assert np.abs(ours - in_torch(folder, [alone], gguf)).max() > 0.1
    assert np.abs(ours - in_llama_cpp(gguf, both)).max() < TOLERANCE
    assert np.abs(ours - in_torch(folder, both[::-1], gguf)).max() < TOLERANCE


def test_it_is_what_the_merged_model_computes(tmp_path: Path, gguf: GGUFModel, folder: Path) -> None:
    adapter = random_adapter(mixed=True, scale=1.0)
    write_peft(adapter, tmp_path / "adapter")
    merge(adapter, 0.7, open_files(folder), tmp_path / "merged")
    ours = in_torch(folder, [(tmp_path / "adapter", 0.7)])
    assert np.abs(ours - in_torch(tmp_path / "merged")).max() < TOLERANCE


def test_a_scale_of_nothing_is_no_adapter(tmp_path: Path, gguf: GGUFModel, folder: Path) -> None:
    plain = in_torch(folder)
    assert np.array_equal(in_torch(folder, [(path, 0.0) for path, _ in two(tmp_path, gguf)], gguf), plain)


def test_an_adapter_of_a_head_that_the_embeddings_share(tmp_path: Path, folder: Path) -> None:
    """It changes the logits and not the embeddings, in the qwen2 model too."""
    rng = np.random.default_rng(0)
    pair = LoraPair(rng.normal(size=(3, 32)).astype("f4"), rng.normal(size=(294, 3)).astype("f4"), 0.5)
    write_peft(Adapter({"lm_head": pair}), tmp_path / "head")
    model = load_model(folder, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        states = model.get_submodule("model")(torch.tensor([TOKENS])).last_hidden_state[0, -1].numpy()
    expected = in_torch(folder) + 0.5 * pair.b @ (pair.a @ states)
    assert np.abs(in_torch(folder, [(tmp_path / "head", 1.0)]) - expected).max() < TOLERANCE


@pytest.mark.parametrize("what", ["another model", "another shape", "no matrix", "not finite", "embeddings"])
def test_a_wrong_adapter_is_named_before_the_weights_are_read(
    tmp_path: Path, folder: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, path = random_adapter(), tmp_path / "adapter"
    name, pair = next(iter(adapter.pairs.items()))
    message = {
        "another model": r"the adapter changes model\.layers\.2\.[\w.]+, which the model does not have",
        "another shape": rf"the adapter's {name} is 31 × 32, the model's 32 × 32",
        "no matrix": r"the adapter changes model\.norm, which is not a linear layer",
        "not finite": "infinite or not a number",
        "embeddings": r"the adapter changes model\.embed_tokens, which is not a linear layer",
    }[what]
    changed = {
        "another model": random_adapter(layers=3).pairs,
        "another shape": {name: replace(pair, b=pair.b[:-1])},
        "no matrix": {"model.norm": pair},
        "not finite": {name: replace(pair, a=np.full_like(pair.a, np.nan))},
        "embeddings": {"model.embed_tokens": pair},
    }[what]
    write_peft(Adapter({**adapter.pairs, **changed}), path)
    loads: list[Path] = []
    monkeypatch.setattr(backend, "load_model", lambda folder, *_: loads.append(folder))
    with pytest.raises(ModelError, match=message) as caught:
        in_torch(folder, [(path, 1.0)])
    assert "\n" not in caught.value.message
    assert not loads


def test_weights_have_the_format_of_the_model(tmp_path: Path, folder: Path) -> None:
    """Casts at every call would cost more than the products."""
    write_peft(random_adapter(), tmp_path / "a")
    options = LoadOptions(context=64, sequences=1, threads=1, adapters=((tmp_path / "a", 1.0),))
    engine = open_folder(folder, options, device="cpu", dtype="bfloat16")
    assert engine.describe().endswith("1 thread, 1 adapter")
    layers = lora_layers(engine._model)
    assert len(layers) == 14
    assert {p.dtype for layer in layers.values() for p in (layer.a, layer.b)} == {torch.bfloat16}
    engine.close()


def test_a_skeleton_has_the_layers_and_no_weights(folder: Path) -> None:
    bones, model = skeleton(folder), load_model(folder, torch.device("cpu"), torch.float32)
    assert {n: p.shape for n, p in bones.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert {p.device.type for p in bones.parameters()} == {"meta"}
    attach(bones, random_adapter())
    assert len(lora_layers(bones)) == 14


def test_an_adapter_in_gguf_s_order_says_what_it_needs(tmp_path: Path, gguf: GGUFModel, folder: Path) -> None:
    write_gguf(random_adapter(), tmp_path / "a.gguf", read_header(gguf.path))
    if gguf.header.architecture == "llama":
        with pytest.raises(ModelError, match="in GGUF's order") as caught:
            in_torch(folder, [(tmp_path / "a.gguf", 1.0)])
        assert "emlocal adapter convert" in caught.value.hint
    else:
        assert np.isfinite(in_torch(folder, [(tmp_path / "a.gguf", 1.0)])).all()
