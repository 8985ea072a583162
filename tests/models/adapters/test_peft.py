"""PEFT reads the adapters that emlocal writes; emlocal reads those that PEFT saves, or says why not."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from emlocal.errors import ModelError
from emlocal.models.adapters import read_adapter
from emlocal.models.adapters.folders import write_peft
from tests.tiny_pair import SHAPES, ModelPair, random_adapter

IDS = [[1, 70, 45, 200, 261, 33, 90, 12]]


def model(pair: ModelPair) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32).eval()


def logits(of: Any) -> np.ndarray:
    """Returns all logits, [1, T, V]."""
    with torch.no_grad():
        rows: np.ndarray = of(torch.tensor(IDS)).logits.numpy()
    return rows


def attached(pair: ModelPair, folder: Path) -> np.ndarray:
    from emlocal.backends.torch.model import attach

    own = model(pair)
    attach(own, read_adapter(folder))
    return logits(own)


@pytest.mark.parametrize("mixed", [False, True])
def test_peft_loads_what_is_written(out: Path, any_pair: ModelPair, mixed: bool) -> None:
    write_peft(random_adapter(mixed=mixed, scale=0.7), out)
    theirs = logits(peft.PeftModel.from_pretrained(model(any_pair), out))
    ours = attached(any_pair, out)
    assert np.abs(ours - logits(model(any_pair))).max() > 0.1
    assert np.abs(ours - theirs).max() < 1e-5


def test_peft_loads_an_adapter_of_some_layers(out: Path, any_pair: ModelPair) -> None:
    from emlocal.models.adapters.adapter import Adapter

    some = {n: p for n, p in random_adapter(mixed=True).pairs.items() if "layers.1.mlp" in n}
    write_peft(Adapter(some), out)
    theirs = peft.PeftModel.from_pretrained(model(any_pair), out)
    adapted = [n for n, _ in theirs.named_modules() if n.endswith("lora_A")]
    assert len(adapted) == len(some) == 3
    assert np.abs(attached(any_pair, out) - logits(theirs)).max() < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.up_proj": 3}},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {r"layers\.1\..*_proj": 7}, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "alpha_pattern": {"^model.layers.0.self_attn.(q|k)_proj": 1, "k_proj": 2}},
        {"r": 4, "lora_alpha": 8, "layers_to_transform": [1]},
        {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", "lora_dropout": 0.1},
    ],
)
def test_what_peft_saves_is_read(out: Path, any_pair: ModelPair, settings: dict[str, Any]) -> None:
    theirs = saved_by_peft(any_pair, out, settings)
    assert np.abs(theirs - logits(model(any_pair))).max() > 0.05
    assert np.abs(attached(any_pair, out) - theirs).max() < 1e-5


def saved_by_peft(pair: ModelPair, out: Path, settings: dict[str, Any]) -> np.ndarray:
    """Saves a random adapter of PEFT's to `out`; returns its logits."""
    targets = [name.rpartition(".")[2] for name in SHAPES]
    config = peft.LoraConfig(**{"target_modules": targets, "task_type": "CAUSAL_LM"} | settings)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(model(pair), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name and parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    theirs.save_pretrained(out)
    return logits(theirs)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "uses DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias is lora_only"),
        ({"lora_bias": True}, "biases on LoRA layers"),
        ({"target_modules": ["embed_tokens"]}, "LoRA on embeddings"),
        ({"target_modules": ["lm_head"]}, "save_embedding_layers"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = olora"),
        ({"trainable_token_indices": [3, 4]}, "trained tokens"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
        ({"alora_invocation_tokens": [5, 6]}, "activated LoRA"),
    ],
)
def test_what_is_no_plain_lora_is_named(
    out: Path, pair: ModelPair, settings: dict[str, Any], words: str
) -> None:
    saved_by_peft(pair, out, settings)
    with pytest.raises(ModelError, match="does not support") as caught:
        read_adapter(out)
    assert words in caught.value.message


def test_an_adapter_of_the_output_matrix(out: Path, pair: ModelPair) -> None:
    saved_by_peft(pair, out, {"target_modules": ["lm_head"]})
    loaded = peft.PeftModel.from_pretrained(model(pair), out)
    loaded.save_pretrained(out, save_embedding_layers=False)
    assert read_adapter(out).pairs.keys() == {"lm_head"}
    assert np.abs(attached(pair, out) - logits(loaded)).max() < 1e-5


def test_other_methods_of_peft(out: Path, pair: ModelPair) -> None:
    config = peft.VeraConfig(target_modules=["q_proj"], r=4)
    peft.get_peft_model(model(pair), config).save_pretrained(out)
    with pytest.raises(ModelError, match="the method VERA"):
        read_adapter(out)


def test_a_pickle_is_never_opened(out: Path, pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    saved_by_peft(pair, out, {})
    (out / "adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, out / "adapter_model.bin")

    def opened(*_: object, **__: object) -> None:
        pytest.fail("something was unpickled")

    openers: list[tuple[Any, str]] = [(pickle, "load"), (pickle, "loads"), (torch, "load")]
    for module, name in openers:
        monkeypatch.setattr(module, name, opened)
    with pytest.raises(ModelError, match="pickles can run code"):
        read_adapter(out)
    with pytest.raises(ModelError, match="is one file of an adapter"):
        read_adapter(out / "adapter_model.bin")
