"""A GGUF LoRA adapter in real llama.cpp: its scale, and its effect on the logits."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emlocal.backends.base import Feed, LoadOptions
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.models.resolve import resolve
from tests.cli.conftest import Outcome, emlocal, tiny  # noqa: F401
from tests.tiny_gguf import Tensor, build, f32, text


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)

    def factor(suffix: str, *shape: int) -> Tensor:
        data = rng.normal(scale=0.2, size=int(np.prod(shape))).astype("<f4").tobytes()
        return Tensor(f"blk.0.attn_v.weight.{suffix}", shape, data)

    metadata = {
        "general.type": text("adapter"),
        "general.architecture": text("llama"),
        "adapter.type": text("lora"),
        "adapter.lora.alpha": f32(8.0),
    }
    path = tmp_path / "adapter.gguf"
    path.write_bytes(build(metadata, [factor("lora_a", 32, 4), factor("lora_b", 4, 16)]))
    return path


def logits(model: str, *adapters: tuple[Path, float]) -> np.ndarray:
    backend = LlamaCppBackend(resolve(model), LoadOptions(adapters=adapters))
    sequence = backend.open()
    backend.forward([Feed(sequence, backend.encode("the cat", add_special=True, parse_special=True))])
    row = backend.logits(sequence)
    backend.close()
    return row


def test_the_scale_scales(tiny: str, adapter: Path) -> None:  # noqa: F811
    plain = logits(tiny)
    assert np.array_equal(logits(tiny, (adapter, 0.0)), plain)
    full = np.abs(logits(tiny, (adapter, 1.0)) - plain).max()
    slight = np.abs(logits(tiny, (adapter, 0.01)) - plain).max()
    assert full > 0.1
    assert 0 < slight < full / 10


def test_two_adapters_add_up(tiny: str, adapter: Path) -> None:  # noqa: F811
    twice = logits(tiny, (adapter, 0.5), (adapter, 0.5))
    assert np.allclose(twice, logits(tiny, (adapter, 1.0)), atol=1e-3)


def test_the_flag(emlocal: Callable[..., Outcome], tiny: str, adapter: Path) -> None:  # noqa: F811
    def answer(*flags: str) -> str:
        done = emlocal("generate", "-m", tiny, "--json", "--temp", "0", "--max-tokens", "8", *flags, "hello")
        assert done.code == 0, done.err
        return str(json.loads(done.out)["text"])

    assert answer("--adapter", f"{adapter}=0") == answer()
    assert answer("--adapter", str(adapter)) != answer()
    refused = emlocal("generate", "-m", tiny, "--adapter", f"{adapter}=much", "x")
    assert refused.code == 2
    assert "the scale after '=' must be a number" in refused.err


def test_an_adapter_for_another_model_is_refused(
    emlocal: Callable[..., Outcome],  # noqa: F811
    tiny: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = tmp_path / "other.gguf"
    metadata = {
        "general.type": text("adapter"),
        "general.architecture": text("qwen2"),
        "adapter.type": text("lora"),
    }
    path.write_bytes(build(metadata, [Tensor("blk.0.attn_q.weight.lora_a", (32, 4), bytes(512))]))
    done = emlocal("generate", "-m", tiny, "--adapter", str(path), "x")
    assert done.code == 1
    assert "qwen2" in done.err
