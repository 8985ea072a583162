"""The meaning of a name: files, short names, names of the hub, and names that mean nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from emlocal.errors import EmlocalError, ModelError, UsageError
from emlocal.models import starter
from emlocal.models.resolve import HubName, catalog, default_model, meaning, resolve
from tests.models.gguf.test_shards import write_shards
from tests.tiny_gguf import write_tiny_gguf


def test_a_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    model = resolve(str(path))
    assert (model.name, model.path, model.files, model.source) == (str(path), path, (path,), "path")
    assert model.header.architecture == "llama"


def test_a_file_in_the_current_folder_and_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve("tiny.gguf").source == "path"
    assert resolve("~/tiny.gguf").path == tmp_path / "tiny.gguf"


def test_a_file_comes_before_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_gguf(tmp_path / "org" / "name" / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name").source == "path"


def test_a_folder_with_one_model(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"a projector")
    (tmp_path / "README.md").write_text("# Tiny")
    assert resolve(str(tmp_path)).path == path


def test_a_folder_with_a_sharded_model(tmp_path: Path) -> None:
    paths = write_shards(tmp_path)
    assert resolve(str(tmp_path)).files == tuple(paths)
    assert resolve(str(paths[2])).path == paths[0]


def test_a_folder_with_several_or_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no GGUF model"):
        resolve(str(tmp_path))
    with pytest.raises(ModelError, match="has no model, in GGUF or safetensors"):
        resolve(str(tmp_path), formats=("safetensors", "gguf"))
    write_tiny_gguf(tmp_path / "a.gguf")
    write_tiny_gguf(tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"has 2 models: a\.gguf, b\.gguf"):
        resolve(str(tmp_path))


def test_a_folder_that_is_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter, not a model") as caught:
        resolve(str(tmp_path), formats=("safetensors", "gguf"))
    assert f"--adapter {tmp_path}" in str(caught.value.hint)


def test_a_file_that_is_no_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_text("these are notes, not a model")
    with pytest.raises(ModelError, match=r'notes\.gguf is not a usable GGUF file: it starts with "thes"'):
        resolve(str(tmp_path / "notes.gguf"))


@pytest.mark.parametrize(
    "name", ["nothing.gguf", "./nothing", "/nothing", "~/nothing", r"C:\nothing", r"a\b", "a/b.gguf"]
)
def test_no_such_file(name: str) -> None:
    with pytest.raises(ModelError, match="there is no file"):
        resolve(name)


@pytest.mark.parametrize("name", ["", " ", "a\0b", "a\nb", "a/b\x1b[2J", "x" * 5000])
def test_names_that_cannot_be_meant(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(name)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd:x",
        "org/../name",
        "org/name:../x.gguf",
        "org/name:/etc/x.gguf",
        "org/..",
        "a/b/c",
        "org/name:",
        "org/name:a:b",
        "C:name",
        "http://example.com/org/name",
        "-rf",
        "org/-name",
        "org/name:a\\b.gguf",
        "zz",
    ],
)
def test_names_that_do_not_reach_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EmlocalError, match=r"there is no (model|file)"):
        resolve(name)


def test_close_names_are_offered() -> None:
    with pytest.raises(ModelError) as caught:
        resolve("qwen25:0.5b")
    assert caught.value.message.startswith("there is no model qwen25:0.5b; did you mean qwen2.5:0.5b or")
    assert caught.value.hint == "list the models that emlocal knows: emlocal models list"
    with pytest.raises(ModelError, match="did you mean gemma3:270m or gemma3:1b or gemma3:4b"):
        resolve("gemma3")


def test_short_names_whatever_their_case() -> None:
    assert meaning("Qwen3:8B") == HubName("Qwen/Qwen3-8B-GGUF", "Q4_K_M")
    assert meaning("smollm2:135m") == catalog()["smollm2:135m"]


def test_the_default_is_the_starter_model() -> None:
    name, reason = default_model()
    assert name == starter.ALIAS == next(iter(catalog()))
    assert "93 MB from the package index" in reason
    with pytest.raises(ModelError, match="smollm2:135m is not on this machine, and --offline is set"):
        resolve(offline=True)


def test_every_entry_of_the_catalog_is_whole() -> None:
    for alias, entry in catalog().items():
        assert alias == alias.lower()
        assert ":" in alias
        assert entry.bytes > 50_000_000
        for repo in filter(None, (entry.gguf, entry.mlx, entry.safetensors)):
            assert meaning(repo) == HubName(repo, None)
        assert entry.safetensors
        assert 8 <= entry.layers <= 80
        cached, heads, numbers = entry.heads
        assert 1 <= cached <= entry.layers
        assert heads in range(1, 33)
        assert numbers in (64, 128, 256, 512)
        assert entry.kv == 4 * cached * heads * numbers
        assert entry.thinks in ("no", "can", "always")
        assert meaning(f"{entry.gguf}:{entry.quant}") == HubName(entry.gguf, entry.quant)
    assert len(catalog()) == 42


def test_a_local_model_needs_neither_the_hub_nor_numpy(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    code = (
        "import sys; from emlocal.models.resolve import resolve; resolve(sys.argv[1]);"
        "assert not {'huggingface_hub', 'numpy', 'llama_cpp'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "tiny.gguf"], check=True, cwd=Path.cwd())
