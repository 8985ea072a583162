"""Packed layers: decoding on CPUs with them equals decoding with the plain model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from emlocal.backends.base import Feed, LoadOptions
from emlocal.backends.torch.backend import TorchBackend, open_folder, open_model
from emlocal.backends.torch.model import PackedLinear, attach, can_pack, lora_layers, pack, packed_bytes
from emlocal.models.adapters.folders import write_peft
from emlocal.models.resolve import resolve
from emlocal.models.unpacked import unpack
from tests.tiny_pair import ModelPair, random_adapter

CPU = torch.device("cpu")
OPTIONS = LoadOptions(context=64, sequences=3, threads=1)


@pytest.fixture(scope="module")
def folder(any_pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return unpack(resolve(str(any_pair.gguf)))


def rows(engine: TorchBackend) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Returns logits, [8, V]: after prompts of several lengths, and steps of one and of several sequences."""
    sequences = [engine.open() for _ in range(3)]
    found = []
    engine.forward([Feed(s, range(5, 9 + 7 * s)) for s in sequences])
    found += [engine.logits(s) for s in sequences]
    engine.forward([Feed(s, [3]) for s in sequences])
    found += [engine.logits(s) for s in sequences]
    for _ in range(2):
        engine.forward([Feed(sequences[0], [11])])
        found.append(engine.logits(sequences[0]))
    return np.stack(found)


@pytest.mark.parametrize("adapted", [False, True])
def test_logits_are_those_of_the_model_as_it_is(folder: Path, tmp_path: Path, adapted: bool) -> None:
    options, adapter = OPTIONS, random_adapter()
    if adapted:
        write_peft(adapter, tmp_path / "adapter")
        options = LoadOptions(context=64, sequences=3, threads=1, adapters=((tmp_path / "adapter", 1.0),))
    plain = open_model(folder, device="cpu", dtype="bfloat16")
    if adapted:
        attach(plain.model, adapter, torch.bfloat16)
    expected = rows(plain.backend(OPTIONS))
    engine = open_folder(folder, options, device="cpu", dtype="bfloat16")
    assert (packed_bytes(engine._model) > 0) == can_pack(CPU, torch.bfloat16)
    assert bool(lora_layers(engine._model)) == adapted
    got = rows(engine)
    assert np.abs(got - expected).max() <= 0.02 * expected.std()
    assert engine.memory_bytes() >= packed_bytes(engine._model)


def test_only_plain_linear_layers_in_bfloat16_are_packed() -> None:
    class Own(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    assert not can_pack(CPU, torch.float32)
    assert not can_pack(torch.device("meta"), torch.bfloat16)
    if can_pack(CPU, torch.bfloat16):
        model = nn.Sequential(nn.Linear(32, 16, bias=False), Own(16, 16), nn.Linear(16, 8)).bfloat16()
        x = torch.randn(2, 3, 32).bfloat16()
        expected = model(x)
        pack(model)
        assert [type(layer) for layer in model] == [PackedLinear, Own, PackedLinear]
        assert packed_bytes(model) == 2 * (32 * 16 + 16 * 8 + 8)
        torch.testing.assert_close(model(x), expected)
