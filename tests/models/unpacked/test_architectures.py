"""Gemma 3, Granite, Phi-3, SmolLM3 and LFM2: a small random GGUF model and its folder give the same logits.

Each has several layers, so that layers of each kind are there. Norms are random, so that a lost one shows.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu
from transformers.activations import GELUTanh

from emlocal.backends.base import Feed, LoadOptions
from emlocal.backends.engine import engine
from emlocal.errors import ModelError
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.models.unpacked import check_runs, unpack
from tests.models.unpacked.test_logits import PROMPT, assert_the_same, llama_cpp_logits
from tests.tiny_architectures import architecture_metadata, architecture_tensors
from tests.tiny_gguf import (
    EMBEDDING,
    FFN,
    HEADS,
    HEADS_KV,
    TOKENS,
    Tensor,
    Value,
    boolean,
    build,
    f32,
    ints,
    text,
    u32,
)

HEAD, KV = EMBEDDING // HEADS, EMBEDDING // HEADS * HEADS_KV
LOAD = """
import sys
from emlocal.errors import ModelError
from emlocal.loading import load
from emlocal.settings.options import EngineOptions
try:
    load(EngineOptions(sys.argv[1], sys.argv[2]), sequences=1)
except ModelError as error:
    print(error.message)
print([m for m in ("torch", "transformers", "mlx", "mlx_lm", "tokenizers", "llama_cpp") if m in sys.modules])
"""
pytestmark = pytest.mark.usefixtures("no_flash_attention")
COARSE = 1e-3
Shapes = dict[str, tuple[int, ...]]
NORMS: Shapes = {"attn_norm": (EMBEDDING,), "ffn_norm": (EMBEDDING,)}
ATTENTION: Shapes = {
    "attn_q": (EMBEDDING, EMBEDDING),
    "attn_k": (EMBEDDING, KV),
    "attn_v": (EMBEDDING, KV),
    "attn_output": (EMBEDDING, EMBEDDING),
}
HEAD_NORMS: Shapes = {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)}
MLP: Shapes = {"ffn_gate": (EMBEDDING, FFN), "ffn_up": (EMBEDDING, FFN), "ffn_down": (FFN, EMBEDDING)}
CONVOLUTION: Shapes = {
    "shortconv.conv": (3, EMBEDDING),
    "shortconv.in_proj": (EMBEDDING, 3 * EMBEDDING),
    "shortconv.out_proj": (EMBEDDING, EMBEDDING),
}
PHI: Shapes = {
    **NORMS,
    "attn_qkv": (EMBEDDING, EMBEDDING + 2 * KV),
    "attn_output": (EMBEDDING, EMBEDDING),
    "ffn_up": (EMBEDDING, 2 * FFN),
    "ffn_down": (FFN, EMBEDDING),
}
GEMMA: Shapes = {
    **NORMS,
    **ATTENTION,
    **HEAD_NORMS,
    **MLP,
    "post_attention_norm": (EMBEDDING,),
    "post_ffw_norm": (EMBEDDING,),
}
LLAMA: Shapes = {**NORMS, **ATTENTION, **MLP}
UNSTRETCHED = {"rope__scaling__attn_factor": f32(1.0)}
HEADED = {"attention__key_length": u32(HEAD), "attention__value_length": u32(HEAD)}


def write(
    path: Path,
    architecture: str,
    layers: list[Shapes],
    more: dict[str, tuple[int, ...]] | None = None,
    norm: str = "output_norm",
    vectors: dict[str, list[float]] | None = None,
    **metadata: Value,
) -> GGUFModel:
    """Writes a model; `more` are tensors beside the layers, `vectors` such with given values."""
    rng = np.random.default_rng(5)
    kv = architecture_metadata(architecture) | {f"{architecture}.block_count": u32(len(layers))}
    kv |= {f"{architecture}.{name.replace('__', '.')}": value for name, value in metadata.items()}
    shapes = {"token_embd.weight": (EMBEDDING, len(TOKENS)), f"{norm}.weight": (EMBEDDING,), **(more or {})}
    for number, parts in enumerate(layers):
        shapes |= {f"blk.{number}.{part}.weight": shape for part, shape in parts.items()}
    tensors = []
    for name, shape in shapes.items():
        middle, spread = (0.8, 0.3) if len(shape) == 1 else (0.0, 0.3)
        data = rng.normal(middle, spread, np.prod(shape)).astype("<f4").tobytes()
        tensors.append(Tensor(name, shape, data))
    for name, values in (vectors or {}).items():
        tensors.append(Tensor(name, (len(values),), np.array(values, "<f4").tobytes()))
    path.write_bytes(build(kv, tensors))
    return resolve(str(path))


def test_smollm3(tmp_path: Path) -> None:
    """Each fourth layer does not rotate positions."""
    assert_the_same(write(tmp_path / "tiny.gguf", "smollm3", [LLAMA] * 5, rope__freq_base=f32(5e4)))


def test_granite(tmp_path: Path) -> None:
    scales = {"attention__scale": f32(0.2), "embedding_scale": f32(3.0), "residual_scale": f32(0.4)}
    assert_the_same(write(tmp_path / "tiny.gguf", "granite", [LLAMA] * 2, logit_scale=f32(2.0), **scales))


def test_granite_with_its_defaults(tmp_path: Path) -> None:
    assert_the_same(write(tmp_path / "tiny.gguf", "granite", [LLAMA] * 2, logit_scale=f32(1.0)))


def test_phi3(tmp_path: Path) -> None:
    assert_the_same(write(tmp_path / "tiny.gguf", "phi3", [PHI] * 2, **UNSTRETCHED))


def test_phi3_rotates_a_part_of_each_head(tmp_path: Path) -> None:
    more = {"output.weight": (EMBEDDING, len(TOKENS))}
    assert_the_same(
        write(tmp_path / "tiny.gguf", "phi3", [PHI] * 2, more, rope__dimension_count=u32(4), **UNSTRETCHED)
    )


def test_phi3_stretches_positions(tmp_path: Path) -> None:
    """Within the original length the short factors count, and so does the attention's factor."""
    vectors = {
        "rope_factors_short.weight": [1.0, 1.1, 1.3, 1.7],
        "rope_factors_long.weight": [1.0, 2.0, 4.0, 8.0],
    }
    stretched = {
        "rope__scaling__original_context_length": u32(256),
        "rope__scaling__attn_factor": f32(1.19),
        "context_length": u32(1024),
    }
    assert_the_same(write(tmp_path / "tiny.gguf", "phi3", [PHI] * 2, vectors=vectors, **stretched))


@pytest.fixture
def coarse_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU as llama.cpp computes it, from a table of half precision (ggml_vec_gelu_f32).

    A value beside the edge between two entries may still take the other one.
    """

    def forward(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        table = gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))

    monkeypatch.setattr(GELUTanh, "forward", forward)


@pytest.mark.usefixtures("coarse_gelu")
@pytest.mark.parametrize("window", [None, 16])
def test_gemma3(tmp_path: Path, window: int | None) -> None:
    """Five layers have a window and positions of their own, the sixth sees everything."""
    sizes = HEADED | {"attention__sliding_window": u32(window or 0)}
    assert_the_same(
        write(tmp_path / "tiny.gguf", "gemma3", [GEMMA] * 7, rope__freq_base=f32(1e6), **sizes), COARSE
    )


@pytest.mark.usefixtures("coarse_gelu")
def test_gemma3_with_scaled_positions_and_a_capped_output(tmp_path: Path) -> None:
    special = {
        "attention__sliding_window": u32(16),
        "attention__sliding_window_pattern": u32(2),
        "rope__scaling__type": text("linear"),
        "rope__scaling__factor": f32(8.0),
        "rope__freq_base_swa": f32(5000.0),
        "final_logit_softcapping": f32(2.0),
    }
    assert_the_same(write(tmp_path / "tiny.gguf", "gemma3", [GEMMA] * 3, **HEADED, **special), COARSE)


def test_lfm2(tmp_path: Path) -> None:
    """Layers of attention among layers of short convolutions."""
    both = {**NORMS, **MLP}
    attention, convolution = {**both, **ATTENTION, **HEAD_NORMS}, {**both, **CONVOLUTION}
    kinds = {"attention__head_count_kv": ints([0, HEADS_KV, 0, 0, HEADS_KV]), "shortconv__l_cache": u32(3)}
    layers = [convolution, attention, convolution, convolution, attention]
    assert_the_same(write(tmp_path / "tiny.gguf", "lfm2", layers, norm="token_embd_norm", **kinds))


def test_other_engines_run_them_as_llama_cpp_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in two pieces, across the windows of Gemma 3.

    mlx-lm rounds Gemma's scale of the embeddings to bfloat16, and llama.cpp its GELU to half precision. torch
    computes in float32, also on processors where it would choose bfloat16.
    """
    monkeypatch.setattr("emlocal.backends.torch.model._best_on_cpu", lambda: torch.float32)
    window = HEADED | {"attention__sliding_window": u32(16)}
    models = [
        write(tmp_path / "smollm3.gguf", "smollm3", [LLAMA] * 5),
        write(tmp_path / "granite.gguf", "granite", [LLAMA] * 2, logit_scale=f32(2.0)),
        write(tmp_path / "phi3.gguf", "phi3", [PHI] * 2, **UNSTRETCHED),
        write(tmp_path / "gemma3.gguf", "gemma3", [GEMMA] * 7, **window),
    ]
    for model in models:
        there = llama_cpp_logits(model, PROMPT)
        for name in filter(lambda name: engine(name).installed(), ("torch", "mlx")):
            check_runs(model, name)
            options = LoadOptions(context=256, sequences=1, shared=False, threads=1)
            backend = engine(name).load(model, options)
            sequence = backend.open()
            for piece in (PROMPT[:100], PROMPT[100:-1], PROMPT[-1:]):
                backend.forward([Feed(sequence, piece)])
            here = backend.logits(sequence)
            backend.close()
            np.testing.assert_allclose(here, there, atol=3e-3, rtol=0, err_msg=f"{model.name} on {name}")


LFM2_LAYERS = [{**NORMS, **MLP, **CONVOLUTION}, {**NORMS, **MLP, **ATTENTION, **HEAD_NORMS}]


def test_what_no_engine_runs_is_said_before_they_are_imported(tmp_path: Path) -> None:
    kinds = {"attention__head_count_kv": ints([0, HEADS_KV]), "shortconv__l_cache": u32(3)}
    write(tmp_path / "lfm2.gguf", "lfm2", LFM2_LAYERS, norm="token_embd_norm", **kinds)
    vectors = {f"rope_factors_{kind}.weight": [1.0] * (HEAD // 2) for kind in ("short", "long")}
    write(tmp_path / "phi3.gguf", "phi3", [PHI], vectors=vectors)
    write(tmp_path / "gemma2.gguf", "gemma2", [GEMMA], **HEADED)
    odd = {"tokenizer.ggml.pre": text("gpt-4o")}
    path = tmp_path / "words.gguf"
    path.write_bytes(build(architecture_metadata("qwen2") | odd, architecture_tensors("qwen2")))
    for name, backend, why in (
        ("lfm2", "torch", "layers without attention"),
        ("lfm2", "mlx", "layers without attention"),
        ("phi3", "mlx", "stretches positions by the text's length"),
        ("gemma2", "torch", "its architecture is gemma2"),
        ("words", "torch", "the pre-tokenizer gpt-4o"),
    ):
        command = [sys.executable, "-c", LOAD, str(tmp_path / f"{name}.gguf"), backend]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd())
        said, modules = done.stdout.splitlines()
        assert why in said
        assert modules == "[]"


@pytest.mark.parametrize(
    ("architecture", "layers", "metadata", "why"),
    [
        ("granite", LLAMA, {"rope__scaling__finetuned": boolean(0)}, "it does not rotate positions"),
        ("gemma3", GEMMA, {"rope__dimension_count": u32(4)}, "it rotates 4 of the 8 numbers of a head"),
        ("phi3", PHI, {"rope__scaling__attn_factor": f32(1.5)}, "rope.scaling.attn_factor is 1.5"),
        ("gemma3", GEMMA, {"rope__scaling__type": text("yarn"), "rope__scaling__factor": f32(4.0)}, "yarn"),
        ("smollm3", {**LLAMA, **HEAD_NORMS}, {}, "emlocal does not know its tensor"),
        ("gemma3", LLAMA, {}, "of its tensors are missing, such as model.layers.0.post_attention_l"),
    ],
)
def test_what_the_classes_cannot_express(
    tmp_path: Path, architecture: str, layers: Shapes, metadata: dict[str, Value], why: str
) -> None:
    scale = {"logit_scale": f32(1.0)} if architecture == "granite" else {}
    sizes = HEADED if architecture == "gemma3" else {}
    model = write(tmp_path / "tiny.gguf", architecture, [layers], **metadata, **scale, **sizes)
    with pytest.raises(ModelError, match=why):
        unpack(model)
