"""Whether an adapter names the model with which it is used as its base."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from emlocal.models.adapters.folders import write_mlx, write_peft
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.adapters.origin import base_of, other_base
from emlocal.models.gguf import GGUFHeader
from tests.tiny_pair import random_adapter

Says = Callable[[object], Path]


@pytest.fixture
def says(tmp_path: Path) -> Says:
    def folder(base: object) -> Path:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        (tmp_path / "adapter_model.safetensors").touch()
        return tmp_path

    return folder


@pytest.mark.parametrize("kind", ["peft", "mlx", "gguf"])
def test_every_format_keeps_what_it_is_of(kind: str, tmp_path: Path, base: GGUFHeader) -> None:
    adapter = replace(random_adapter(), base_model="org/Tiny-1B")
    out = tmp_path / f"adapter.{kind}"
    if kind == "gguf":
        write_gguf(adapter, out, base)
    else:
        (write_peft if kind == "peft" else write_mlx)(adapter, out)
    assert base_of(out) == "org/Tiny-1B"
    said = other_base(out, "big:7b", None)
    assert said is not None
    assert f"{out} names org/Tiny-1B as its base model, but this is big:7b" in said


@pytest.mark.parametrize(
    ("base", "model"),
    [
        ("smollm2:135m", "smollm2:135m"),
        ("smollm2:135m", "/models/SmolLM2-135M-Instruct-Q4_K_M.gguf"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2:135m"),
        ("unsloth/Qwen2.5-0.5B-Instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0"),
        ("/home/me/models/mine/", "mine"),
        ("C:\\models\\mine.gguf", "mine.gguf"),
        (None, "anything"),
        ("", "anything"),
    ],
)
def test_one_model_has_many_names(base: object, model: str, says: Says) -> None:
    assert other_base(says(base), model, None) is None


@pytest.mark.parametrize(
    ("base", "model"),
    [
        ("smollm2:135m", "smollm2:360m"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5:0.5b"),  # the short name means the instruct model
        ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        ("mine", "yours"),
    ],
)
def test_another_model(base: str, model: str, says: Says) -> None:
    assert other_base(says(base), model, None) is not None


def test_what_the_models_file_says_counts(says: Says, base: GGUFHeader) -> None:
    assert other_base(says(f"org/{base.name}"), "renamed.gguf", base) is None
    assert other_base(says(base.path.stem), "a:1b", base) is None
