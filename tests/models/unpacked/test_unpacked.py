"""Unpacking GGUF models: the content of the folder, and failures half-way."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from emlocal.errors import ModelError
from emlocal.files import cache_dir
from emlocal.identity import gguf_digest
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.models.unpacked import MANIFEST, WEIGHTS, unpack
from tests.tiny_architectures import architecture_metadata, architecture_tensors, write_tiny_architecture
from tests.tiny_gguf import (
    GGML_Q8_0,
    Tensor,
    build,
    f32,
    text,
    tiny_metadata,
    tiny_tensors,
    write_tiny_gguf,
)

Q2_0 = 42

UNPACK = """
import os, signal, sys
from pathlib import Path
from emlocal.models.resolve import resolve
from emlocal.models.unpacked import unpack

steps = []
def progress(label, done, total):
    steps.append(label)
    if sys.argv[2] == "die" and total and done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

print(unpack(resolve(sys.argv[1]), progress))
print(sum(label.startswith("unpacking") for label in steps))
assert not {"torch", "transformers", "llama_cpp"} & set(sys.modules)
"""


def start(model: Path, what: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", UNPACK, model, what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )


@pytest.fixture
def tiny(tmp_path: Path) -> GGUFModel:
    return resolve(str(write_tiny_gguf(tmp_path / "tiny.gguf")))


def left_behind() -> list[str]:
    """Returns the names in the cache beside whole folders and locks."""
    return [p.name for p in (cache_dir() / "unpacked").iterdir() if p.name[0] == "." and p.suffix != ".lock"]


def test_what_is_in_the_folder(tiny: GGUFModel) -> None:
    folder = unpack(tiny)
    assert folder == cache_dir() / "unpacked" / gguf_digest(tiny.header)
    config, generation, own = (
        json.loads((folder / f"{name}.json").read_text("utf-8"))
        for name in ("config", "generation_config", "tokenizer_config")
    )
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert (config["max_position_embeddings"], config["rope_theta"]) == (256, 10000.0)
    assert config["rms_norm_eps"] == pytest.approx(1e-5)
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    ends = [tiny.header.vocab_size - 1, 2]  # <|im_end|>, and </s> by its text
    assert generation["eos_token_id"] == sorted(ends)
    assert (generation["temperature"], generation["top_k"]) == (0.5, 20)
    assert (own["bos_token"], own["eos_token"], own["unk_token"]) == ("<s>", "<|im_end|>", "<unk>")
    assert (folder / "chat_template.jinja").read_text("utf-8") == tiny.header.chat_template
    assert not left_behind()


def test_it_is_made_once(tiny: GGUFModel) -> None:
    folder = unpack(tiny)
    before = (folder / WEIGHTS).stat().st_mtime_ns
    steps: list[str] = []
    assert unpack(tiny, lambda label, done, total: steps.append(label)) == folder
    assert (folder / WEIGHTS).stat().st_mtime_ns == before
    assert steps == []


def test_quantized_tensors_become_f16_and_vectors_f32(tmp_path: Path) -> None:
    kept = {t.name: t for t in tiny_tensors()}
    rows = np.frombuffer(kept["blk.0.ffn_down.weight"].data, "<f4").reshape(32, 64)
    packed = quantize(rows, GGMLQuantizationType.Q8_0)
    kept["blk.0.ffn_down.weight"] = Tensor("blk.0.ffn_down.weight", (64, 32), packed.tobytes(), GGML_Q8_0)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build(tiny_metadata(), list(kept.values())))
    weights = load_file(unpack(resolve(str(path))) / WEIGHTS)
    down = weights["model.layers.0.mlp.down_proj.weight"]
    assert down.dtype == np.float16
    np.testing.assert_array_equal(down, dequantize(packed, GGMLQuantizationType.Q8_0).astype("<f2"))
    assert weights["model.norm.weight"].dtype == np.float32
    assert weights["model.embed_tokens.weight"].dtype == np.float32


def test_nan_is_left_alone(tmp_path: Path) -> None:
    tensors = {t.name: t for t in tiny_tensors()}
    for name in ("blk.0.attn_v.weight", "blk.0.attn_q.weight"):
        bits = np.frombuffer(tensors[name].data, "<u4").copy()
        bits[3] = 0x7FC00123  # a NaN with a payload
        tensors[name].data = bits.tobytes()
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build(tiny_metadata(), list(tensors.values())))
    weights = load_file(unpack(resolve(str(path))) / WEIGHTS)
    assert weights["model.layers.0.self_attn.v_proj.weight"].view("<u4")[0, 3] == 0x7FC00123
    assert (weights["model.layers.0.self_attn.q_proj.weight"].view("<u4") == 0x7FC00123).sum() == 1


def test_the_same_contents_have_the_same_name_wherever_they_lie(tmp_path: Path, tiny: GGUFModel) -> None:
    copy = tmp_path / "elsewhere" / "copy.gguf"
    copy.parent.mkdir()
    shutil.copy(tiny.path, copy)
    assert gguf_digest(resolve(str(copy)).header) == gguf_digest(tiny.header)


def test_other_weights_and_other_metadata_have_other_names(tmp_path: Path, tiny: GGUFModel) -> None:
    names = {gguf_digest(tiny.header)}
    for tensor in tiny_tensors():
        tensors = tiny_tensors()
        changed = next(t for t in tensors if t.name == tensor.name)
        changed.data = (np.frombuffer(changed.data, "<f4") * 1.001).astype("<f4").tobytes()
        path = tmp_path / "other.gguf"
        path.write_bytes(build(tiny_metadata(), tensors))
        names.add(gguf_digest(resolve(str(path)).header))
    write_tiny_gguf(path, llama__rope__freq_base=f32(20000.0))
    names.add(gguf_digest(resolve(str(path)).header))
    assert len(names) == len(tiny_tensors()) + 2


def test_killed_half_way(tiny: GGUFModel) -> None:
    dead = start(tiny.path, "die")
    dead.communicate(timeout=60)
    assert dead.returncode == -9
    assert len(left_behind()) == 1
    folder = unpack(tiny)
    assert len(load_file(folder / WEIGHTS)) == len(tiny.header.tensors)
    assert (folder / MANIFEST).exists()
    assert not left_behind()


def test_two_at_once(tiny: GGUFModel) -> None:
    running = [start(tiny.path) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    folders, writes = zip(*(out.split() for out, _ in said), strict=True)
    assert set(folders) == {str(cache_dir() / "unpacked" / gguf_digest(tiny.header))}
    assert sorted(map(int, writes))[0] == 0  # one of them found it already made
    assert not left_behind()


def test_stopped_by_the_user(tiny: GGUFModel) -> None:
    def stop(label: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(tiny, stop)
    assert not left_behind()
    assert not (cache_dir() / "unpacked" / gguf_digest(tiny.header)).exists()


def test_no_space(tiny: GGUFModel, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(ModelError, match=r"^unpacking Tiny needs \d+ kB of disk, but .* has 5 kB free$"):
        unpack(tiny)
    assert not left_behind()


def test_no_place_to_write(tiny: GGUFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot write to .*unpacked: Not a directory"):
        unpack(tiny)


@pytest.mark.parametrize(
    "damage", ["cut", "no tokenizer", "no manifest", "bad manifest", "other header", "empty"]
)
def test_a_damaged_folder_is_made_again(tiny: GGUFModel, damage: str) -> None:
    folder = unpack(tiny)
    sound = {p.name: p.read_bytes() for p in folder.iterdir()}
    weights = sound[WEIGHTS]
    if damage == "cut":
        (folder / WEIGHTS).write_bytes(weights[:-100])
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "no manifest":
        (folder / MANIFEST).unlink()
    elif damage == "bad manifest":
        (folder / MANIFEST).write_text('{"files": 3}')
    elif damage == "other header":
        (folder / WEIGHTS).write_bytes(weights[:8] + b"[" + weights[9:])
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert unpack(tiny) == folder
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == sound


def test_a_model_that_shrinks_meanwhile(tiny: GGUFModel) -> None:
    with tiny.path.open("rb+") as file:
        file.truncate(tiny.header.file_size - 4096)
    with pytest.raises(ModelError, match="it became shorter during reading"):
        unpack(tiny)
    assert not left_behind()


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    model = resolve(str(write_tiny_architecture(tmp_path / "tiny.gguf", "gemma2")))
    message = r"its architecture is gemma2; llama, qwen2, .* and lfm2 can be unpacked"
    with pytest.raises(ModelError, match=message) as caught:
        unpack(model)
    assert "--backend llama.cpp; to train" in str(caught.value.hint)


def test_what_the_model_classes_do_not_have_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    ones = np.ones(32, "<f4").tobytes()
    cases = [
        ({"llama.attention.scale": f32(0.5)}, [], "llama.attention.scale is 0.5"),
        ({"llama.rope.scaling.type": text("longrope")}, [], "rope.scaling.type is longrope"),
        (
            {},
            [Tensor("blk.0.attn_sub_norm.weight", (32,), ones)],
            "not know its tensor blk.0.attn_sub_norm.weight",
        ),
        ({}, [Tensor("blk.0.attn_q.bias", (32,), ones)], r"self_attn\.k_proj\.bias is not there"),
        (
            {},
            [Tensor("rope_freqs.weight", (4,), ones[:16].replace(b"\x80?", b"\x00@", 1))],
            "by Llama 3's rule",
        ),
    ]
    for metadata, tensors, message in cases:
        path.write_bytes(build(architecture_metadata("llama") | metadata, [*tiny_tensors(), *tensors]))
        with pytest.raises(ModelError, match=message):
            unpack(resolve(str(path)))
    fewer = [t for t in architecture_tensors("qwen2") if t.name != "blk.0.attn_k.bias"]
    path.write_bytes(build(architecture_metadata("qwen2"), fewer))
    with pytest.raises(ModelError, match=r"k_proj\.bias is not there, which no Qwen2ForCausalLM can have"):
        unpack(resolve(str(path)))
    fewer = [t for t in tiny_tensors() if t.name != "blk.0.ffn_up.weight"]
    path.write_bytes(build(tiny_metadata(), fewer))
    with pytest.raises(ModelError, match=r"1 of its tensors are missing, such as .*mlp\.up_proj\.weight"):
        unpack(resolve(str(path)))


def test_a_quantization_that_numpy_cannot_undo_is_refused(tmp_path: Path) -> None:
    tensors = [t for t in tiny_tensors() if t.name != "blk.0.ffn_down.weight"]
    tensors.append(Tensor("blk.0.ffn_down.weight", (64, 32), bytes(18 * 32), Q2_0))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(build(tiny_metadata(), tensors))
    with pytest.raises(ModelError, match="cannot be unpacked: it has tensors of type Q2_0"):
        unpack(resolve(str(path)))
