"""The same adapter gives the same logits in llama.cpp and transformers: names, order, scale."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emlocal.backends.base import Feed, LoadOptions
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.models.adapters.folders import write_mlx, write_peft
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.gguf import read_header
from emlocal.models.resolve import resolve
from tests.tiny_pair import ModelPair, random_adapter

TOLERANCE = 1e-4
TOKENS = [1, 70, 45, 200, 261, 33, 90, 12, 150, 7]


pytestmark = pytest.mark.usefixtures("no_flash_attention")


def in_transformers(pair: ModelPair, adapter: Adapter | None) -> np.ndarray:
    """Returns the logits [V] after TOKENS, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from emlocal.backends.torch.model import attach

    model = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32).eval()
    if adapter is not None:
        attach(model, adapter)
    with torch.no_grad():
        row: np.ndarray = model(torch.tensor([TOKENS])).logits[0, -1].numpy()
    return row


def in_llama_cpp(pair: ModelPair, *adapters: tuple[Path, float]) -> np.ndarray:
    """Returns the same from llama.cpp."""
    options = LoadOptions(context=64, sequences=1, kv_type="f32", adapters=adapters)
    backend = LlamaCppBackend(resolve(str(pair.gguf)), options)
    row = logits(backend)
    backend.close()
    return row


def logits(backend: LlamaCppBackend) -> np.ndarray:
    sequence = backend.open()
    backend.forward([Feed(sequence, TOKENS)])
    row = backend.logits(sequence)
    backend.release(sequence)
    return row


def scaled(adapter: Adapter, scale: float) -> Adapter:
    return Adapter({n: replace(p, scale=p.scale * scale) for n, p in adapter.pairs.items()})


@pytest.mark.real
@pytest.mark.parametrize("form", ["peft", "mlx", "gguf"])
def test_llama_cpp_computes_what_transformers_does(tmp_path: Path, any_pair: ModelPair, form: str) -> None:
    adapter, path = random_adapter(mixed=True, scale=1.0), tmp_path / "adapter"
    if form == "peft":
        write_peft(adapter, path)
    elif form == "mlx":
        write_mlx(adapter, path)
    else:
        write_gguf(adapter, path, read_header(any_pair.gguf))
    plain, wanted = in_transformers(any_pair, None), in_transformers(any_pair, scaled(adapter, 0.7))
    assert np.abs(in_llama_cpp(any_pair) - plain).max() < TOLERANCE
    assert np.abs(wanted - plain).max() > 0.5, "the adapter must do something"
    assert np.abs(in_llama_cpp(any_pair, (path, 0.7)) - wanted).max() < TOLERANCE


@pytest.mark.real
def test_an_adapter_of_the_output_matrix(tmp_path: Path, pair: ModelPair) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 32)).astype("f4"), rng.normal(size=(294, 3)).astype("f4")
    adapter = Adapter({"lm_head": LoraPair(a, b, 0.5)})
    write_peft(adapter, tmp_path / "a")
    wanted = in_transformers(pair, adapter)
    assert np.abs(wanted - in_transformers(pair, None)).max() > 0.5
    assert np.abs(in_llama_cpp(pair, (tmp_path / "a", 1.0)) - wanted).max() < TOLERANCE


@pytest.mark.real
def test_the_order_of_rows_matters(tmp_path: Path, pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the permutation the same test fails, so it does test the permutation."""
    from emlocal.models.adapters import gguf_lora

    monkeypatch.setattr(gguf_lora, "to_gguf_rows", lambda name, b, base: b)
    write_gguf(random_adapter(scale=1.0), tmp_path / "a.gguf", read_header(pair.gguf))
    wanted = in_transformers(pair, random_adapter(scale=1.0))
    assert np.abs(in_llama_cpp(pair, (tmp_path / "a.gguf", 1.0)) - wanted).max() > 0.05
