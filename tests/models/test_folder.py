"""Hugging Face model folders: which are accepted, which are refused, and how the hub delivers them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from emlocal.errors import ModelError
from emlocal.files import TOOL_USE, read_chat_template
from emlocal.models.folder import needed_files, read_folder_header
from emlocal.models.memory import estimate
from emlocal.models.resolve import FolderModel, GGUFModel, resolve
from emlocal.models.unpacked import unpack
from tests.models.conftest import Resolve
from tests.models.fake_hub import FakeHub
from tests.tiny_gguf import tiny_gguf, write_tiny_gguf

BOTH = ("safetensors", "gguf")
REPO = "someone/Tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model as a folder without emlocal's manifest."""
    path = tmp_path / "folder"
    made = unpack(resolve(str(write_tiny_gguf(tmp_path / "source.gguf"))))
    shutil.copytree(made, path, ignore=shutil.ignore_patterns("emlocal.json"))
    return path


def shard(folder: Path, count: int = 2) -> dict[str, str]:
    """Splits the weights into shards with an index; returns its weight_map."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    where = {tensor: names[n % count] for n, tensor in enumerate(weights)}
    for name in names:
        save_file({t: weights[t] for t, file in where.items() if file == name}, folder / name)
    write_index(folder, where)
    return where


def write_index(folder: Path, where: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def change(folder: Path, **config: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | config))


def test_a_folder_says_what_its_gguf_says(tmp_path: Path, folder: Path) -> None:
    model = resolve(str(folder), formats=BOTH)
    gguf = resolve(str(tmp_path / "source.gguf"), formats=BOTH)
    assert isinstance(model, FolderModel)
    assert isinstance(gguf, GGUFModel)
    assert (model.path, model.files, model.source) == (folder, (folder / "model.safetensors",), "path")
    for name in (
        *("architecture", "context_length", "embedding_length", "block_count", "head_count", "head_count_kv"),
        *("key_length", "value_length", "feed_forward_length", "vocab_size", "chat_template", "sampling"),
        *("parameters", "multiplied_parameters", "weights_bytes", "quantization"),
    ):
        assert getattr(model.header, name) == getattr(gguf.header, name), name
    assert estimate(model.header, 256) == estimate(gguf.header, 256)
    assert model.header.name == "folder"


def test_llama_cpp_names_the_engine_that_runs_it(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"has a model in safetensors, which llama\.cpp does not run"
    ) as caught:
        resolve(str(folder))
    assert "--backend torch" in (caught.value.hint or "")


def test_where_there_are_both_each_engine_takes_what_it_likes(folder: Path) -> None:
    write_tiny_gguf(folder / "tiny.gguf")
    assert resolve(str(folder)).path == folder / "tiny.gguf"
    assert resolve(str(folder), formats=("gguf", "safetensors")).path == folder / "tiny.gguf"
    assert resolve(str(folder), formats=BOTH).path == folder
    assert resolve(str(folder / "tiny.gguf"), formats=BOTH).path == folder / "tiny.gguf"


def test_one_file_of_a_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="is one file of a model") as caught:
        resolve(str(folder / "model.safetensors"), formats=BOTH)
    assert caught.value.hint == f"name its folder: -m {folder}"


@pytest.mark.parametrize("formats", [BOTH, ("gguf",)])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickles_are_refused(folder: Path, name: str, formats: Any) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=f"its weights are in {name} only, a format that can run code"):
        resolve(str(folder), formats=formats)


def test_pickles_beside_safetensors_are_not_looked_at(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    change(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text("raise SystemExit(1)")
    assert resolve(str(folder), formats=BOTH).files == (folder / "model.safetensors",)


def test_shards(folder: Path) -> None:
    whole = read_folder_header(folder)
    shard(folder, 3)
    header = read_folder_header(folder)
    assert len(header.files) == 3
    assert header.tensors.keys() == whole.tensors.keys()
    assert (header.parameters, header.weights_bytes) == (whole.parameters, whole.weights_bytes)


def test_shards_that_do_not_fit_together(folder: Path) -> None:
    where = shard(folder)
    first, second = sorted(set(where.values()))
    tensor = next(t for t, f in where.items() if f == first)
    for index, message in (
        ({t: f for t, f in where.items() if t != tensor}, "differ in 1 places"),
        (where | {tensor: second}, "differ in 2 places"),
        (where | {"more": first}, "differ in 1 places"),
        (where | {tensor: "../../etc/passwd"}, "differ in 2 places"),
    ):
        write_index(folder, index)
        with pytest.raises(ModelError, match=message):
            read_folder_header(folder)
    write_index(folder, where)
    save_file(load_file(folder / second) | {tensor: np.zeros(1, "<f4")}, folder / second)
    with pytest.raises(ModelError, match="is in two of its files"):
        read_folder_header(folder)
    (folder / second).write_bytes((folder / second).read_bytes()[:-1])
    with pytest.raises(ModelError, match="is not a usable safetensors file"):
        read_folder_header(folder)
    (folder / second).unlink()
    with pytest.raises(ModelError, match="its safetensors are missing or incomplete"):
        read_folder_header(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None, not a number from 1"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings is 1099511627776"),
    ],
)
def test_configs_that_cannot_be(folder: Path, config: dict[str, Any], message: str) -> None:
    change(folder, **config)
    with pytest.raises(ModelError, match=message):
        read_folder_header(folder)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"it has no tokenizer\.json"):
        resolve(str(folder), formats=BOTH)


def test_the_language_part_of_a_larger_model(folder: Path) -> None:
    inner = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": inner}))
    header = read_folder_header(folder)
    assert (header.architecture, header.embedding_length) == ("mistral3", 32)


def test_packed_weights_say_their_bits(folder: Path) -> None:
    change(folder, quantization={"group_size": 64, "bits": 4})
    assert read_folder_header(folder).quantization == "4-bit"


def test_a_table_that_is_only_looked_up_is_not_multiplied(folder: Path) -> None:
    """FLOPs count the parameters that a token is multiplied with.

    A tied embedding counts, as it is the output.
    """
    shared = read_folder_header(folder)
    assert "lm_head.weight" not in shared.tensors
    assert shared.multiplied_parameters == shared.parameters
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": table.copy()}, folder / "model.safetensors")
    own = read_folder_header(folder)
    assert own.parameters == shared.parameters + table.size
    assert own.multiplied_parameters == shared.multiplied_parameters


def test_packed_weights_are_counted_as_weights(folder: Path) -> None:
    """MLX packs eight 4-bit weights in 32 bits, and has scales and offsets of groups, and a bias."""
    layer = "model.layers.0.self_attn.q_proj"
    weights = load_file(folder / "model.safetensors")
    whole = read_folder_header(folder)
    rows, columns = weights[f"{layer}.weight"].shape
    packed = {
        f"{layer}.weight": np.zeros((rows, columns // 8), np.uint32),
        f"{layer}.scales": np.zeros((rows, columns // 32), np.float16),
        f"{layer}.biases": np.zeros((rows, columns // 32), np.float16),
        f"{layer}.bias": np.zeros(rows, np.float16),
    }
    save_file(weights | packed, folder / "model.safetensors")
    change(folder, quantization={"group_size": 32, "bits": 4})
    assert read_folder_header(folder).parameters == whole.parameters + rows
    change(folder, quantization={"group_size": 32, "bits": 2, layer: {"group_size": 32, "bits": 4}})
    assert read_folder_header(folder).parameters == whole.parameters + rows


def test_which_files_are_needed() -> None:
    common = ["config.json", "tokenizer.json", "README.md", "generation_config.json", "pytorch_model.bin"]
    assert needed_files(
        [*common, "model.safetensors", "original/consolidated.safetensors", "onnx/m.onnx"]
    ) == (
        *("generation_config.json", "tokenizer.json", "config.json"),
        "model.safetensors",
    )
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = "model.safetensors.index.json"
    assert needed_files([*common, *shards, index])[-3:] == (index, *shards)
    assert needed_files([*common, shards[0], index]) == ()
    assert needed_files([*common, *shards]) == ()
    assert needed_files(common) == ()
    assert needed_files(["config.json", "model.safetensors"]) == ()


@pytest.fixture
def hub(fake_hub: FakeHub, folder: Path) -> FakeHub:
    shard(folder)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    fake_hub.repos[REPO] = files | {
        "README.md": b"# Tiny",
        "pytorch_model.bin": b"no",
        "original/m.pth": b"no",
    }
    return fake_hub


def test_only_what_is_needed_is_fetched_and_then_used_without_a_request(
    hub: FakeHub, resolve: Resolve
) -> None:
    first = resolve(REPO, formats=BOTH)
    assert (first["source"], len(first["files"])) == ("hub", 2)
    names = {p.name for p in Path(first["path"]).iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("chat_template.jinja", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }
    hub.requests.clear()
    assert resolve(REPO, formats=BOTH)["path"] == first["path"]
    assert resolve(REPO, formats=["gguf", "safetensors"], offline=True)["path"] == first["path"]
    assert hub.requests == []
    assert read_folder_header(Path(first["path"])).name == "Tiny"


def test_a_download_that_broke_off_is_not_taken_for_the_model(hub: FakeHub, resolve: Resolve) -> None:
    hub.cuts["model-00002-of-00002.safetensors"] = 99
    assert "error" in resolve(REPO, formats=BOTH)
    assert "is not on this machine" in resolve(REPO, formats=BOTH, offline=True)["error"]
    hub.cuts.clear()
    assert len(resolve(REPO, formats=BOTH)["files"]) == 2


def test_llama_cpp_and_repositories_of_safetensors(hub: FakeHub, resolve: Resolve) -> None:
    answer = resolve(REPO)
    assert answer["error"] == f"{REPO} has no GGUF model"
    assert "--backend torch" in answer["hint"]
    assert not [r for r in hub.requests if "/resolve/" in r]


def test_a_quantization_means_gguf(hub: FakeHub, resolve: Resolve) -> None:
    hub.repos[REPO]["tiny-Q8_0.gguf"] = tiny_gguf()
    assert Path(resolve(f"{REPO}:Q8_0", formats=BOTH)["path"]).name == "tiny-Q8_0.gguf"
    # files on this machine come before those that must be fetched
    assert Path(resolve(REPO, formats=BOTH)["path"]).name == "tiny-Q8_0.gguf"
    assert "it has Q8_0" in resolve(f"{REPO}:Q4_0", formats=BOTH)["error"]


def test_repositories_with_nothing_to_use(hub: FakeHub, resolve: Resolve) -> None:
    hub.repos[REPO] = {"config.json": b"{}", "pytorch_model.bin": b"no"}
    answer = resolve(REPO, formats=BOTH)
    assert "its weights are in pytorch_model.bin only" in answer["error"]
    hub.repos[REPO] = {"config.json": b"{}", "model.safetensors": b"no"}
    assert answer["error"] != resolve(REPO, formats=BOTH)["error"]
    assert "it has no tokenizer.json" in resolve(REPO, formats=BOTH)["error"]


def test_a_repository_of_gguf_is_unpacked_by_engines_that_take_both(hub: FakeHub, resolve: Resolve) -> None:
    hub.repos[REPO] = {"tiny-Q4_K_M.gguf": tiny_gguf()}
    assert Path(resolve(REPO, formats=BOTH)["path"]).name == "tiny-Q4_K_M.gguf"


@pytest.mark.parametrize(
    ("files", "default", "tools"),
    [
        ({}, None, None),
        ({"chat_template.json": {"chat_template": "J"}}, "J", None),
        (
            {"chat_template.json": {"chat_template": "J"}, "tokenizer_config.json": {"chat_template": "T"}},
            "T",
            None,
        ),
        ({"chat_template.json": {"chat_template": {"default": "D", "tool_use": "U"}}}, "D", "U"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "R"}]}}, "R", None),
        ({"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": "U"}]}}, None, "U"),
        ({"tokenizer_config.json": {"chat_template": [5, {"name": "default", "template": 5}]}}, None, None),
        ({"chat_template.jinja": "X", "tokenizer_config.json": {"chat_template": "T"}}, "X", None),
        ({"chat_template.jinja": "X", "additional_chat_templates/tool_use.jinja": "A"}, "X", "A"),
    ],
)
def test_chat_templates_by_name(
    files: dict[str, Any], default: str | None, tools: str | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert (read_chat_template(tmp_path), read_chat_template(tmp_path, TOOL_USE)) == (default, tools)
