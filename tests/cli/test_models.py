"""`emlocal models`: answers on stdout, everything else on stderr; showing a model fetches nothing."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from emlocal.cli.models import app
from emlocal.errors import ModelError, UsageError
from emlocal.models import starter
from emlocal.models.resolve import resolve
from emlocal.models.unpacked import unpack
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path / "cache"))
    import huggingface_hub.constants

    # huggingface_hub reads it on import, which another test may have done before.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def run(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=input)


def cache_model(tmp_path: Path, repo: str, *files: str) -> Path:
    """Put the tiny model into the hub's cache, as huggingface_hub lays it out."""
    folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    (folder / "refs").mkdir(parents=True)
    (folder / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    for number, file in enumerate(files):
        blob = write_tiny_gguf(folder / "blobs" / f"{number:064x}", seed=number)
        (snapshot / file).symlink_to(blob)
    return folder


def put_starter(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the tiny model in the starter model's place."""
    path = write_tiny_gguf(starter.starter_path())
    monkeypatch.setattr(starter, "FILE_BYTES", path.stat().st_size)
    return path


def test_list_shows_every_model_and_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_model(tmp_path, "Qwen/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf")
    cache_model(tmp_path, "someone/Other-GGUF", "other-Q8_0.gguf")
    put_starter(monkeypatch)
    result = run("list", "--json")
    assert result.exit_code == 0
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert rows["smollm2:135m"]["on_disk"]
    assert rows["qwen3:8b"]["on_disk"]
    assert rows["qwen3:8b"]["bytes"] < 100_000, "the size on disk, not the catalog's"
    assert not rows["qwen3:4b"]["on_disk"]
    assert rows["someone/Other-GGUF:Q8_0"]["on_disk"]
    table = run("list").stdout
    assert re.search(r"^qwen3:4b +4B +2\.5 GB +\w.* can +Apache-2\.0 *$", table, re.MULTILINE)
    assert re.search(r"^someone/Other-GGUF:Q8_0 +8\d kB +yes *$", table, re.MULTILINE)
    assert "\x1b" not in table
    assert rows["gpt-oss:20b"]["thinks"] == "always"
    assert rows["qwen3:8b"]["fits"]


def test_show_of_a_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    facts = json.loads(run("show", str(path), "--json").stdout)
    in_effect = facts.pop("sampling_in_effect")
    assert in_effect["temperature"] == {"value": 0.5, "from": "model"}
    assert in_effect["min_p"] == {"value": 0.05, "from": "default"}
    assert facts == {
        "name": str(path),
        "on_disk": True,
        "title": "Tiny",
        "architecture": "llama",
        "parameters": 18_720,
        "quantization": "F32",
        "weights_bytes": 74_880,
        "context_length": 256,
        "vocabulary": 294,
        "chat_template": True,
        "license": "apache-2.0",
        "sampling": {"temperature": 0.5, "top_k": 20},
        "source": "path",
        "files": [str(path)],
    }
    table = run("show", str(path)).stdout
    assert re.search(r"^sampling +temperature 0\.5, top_k 20 *$", table, re.MULTILINE)
    assert re.search(r"^chat template +yes *$", table, re.MULTILINE)
    assert re.search(r"^ +top_k 20 \(model\) *$", table, re.MULTILINE)


def test_show_prints_no_escapes_out_of_a_file(tmp_path: Path) -> None:
    from tests.tiny_gguf import text

    path = write_tiny_gguf(tmp_path / "tiny.gguf", general__name=text("\x1b]0;owned\x07 [red]Tiny"))
    table = run("show", str(path)).stdout
    assert "\x1b" not in table
    assert "[red]Tiny" in table


def test_show_of_what_is_not_here_fetches_nothing() -> None:
    result = run("show", "qwen3:8b")
    assert result.exit_code == 0
    assert "Qwen/Qwen3-8B-GGUF:Q4_K_M" in result.stdout
    assert "emlocal models pull qwen3:8b" in result.stderr
    assert json.loads(run("show", "qwen3:8b", "--json").stdout)["on_disk"] is False
    missing = run("show", "someone/Other-GGUF")
    assert isinstance(missing.exception, ModelError)
    assert missing.exception.hint == "fetch it: emlocal models pull someone/Other-GGUF"


def test_pull_of_what_is_here_prints_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_starter(monkeypatch)
    result = run("pull", "smollm2:135m")
    assert result.stdout == f"{path}\n"
    assert result.stderr == "smollm2:135m: llama, 0 million parameters, F32, 83 kB\n"


def test_path_is_for_scripts(tmp_path: Path) -> None:
    folder = cache_model(tmp_path, "Qwen/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf")
    result = run("path", "qwen3:8b")
    assert result.stdout == f"{folder / 'snapshots' / ('a' * 40) / 'Qwen3-8B-Q4_K_M.gguf'}\n"
    assert result.stderr == ""
    assert isinstance(run("path", "qwen3:4b").exception, ModelError)


def test_rm_asks_and_removes_from_the_cache(tmp_path: Path) -> None:
    folder = cache_model(tmp_path, "Qwen/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf", "Qwen3-8B-Q8_0.gguf")
    refused = run("rm", "qwen3:8b", input="n\n")
    assert refused.exit_code == 1
    assert "Qwen3-8B-Q4_K_M.gguf, Qwen3-8B-Q8_0.gguf; 1" in refused.stderr.replace("166 kB", "1")
    assert folder.exists()
    removed = run("rm", "qwen3:8b", "--yes")
    assert removed.exit_code == 0
    assert removed.stderr == "removed Qwen/Qwen3-8B-GGUF from the Hugging Face cache: 166 kB freed\n"
    assert not folder.exists()
    assert isinstance(run("rm", "qwen3:8b", "--yes").exception, ModelError)


def test_rm_of_the_starter_model(monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_starter(monkeypatch)
    assert run("rm", "smollm2:135m", "--yes").exit_code == 0
    assert not path.exists()


def test_rm_never_touches_files_of_the_user(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "mine.gguf")
    result = run("rm", str(path), "--yes")
    assert isinstance(result.exception, UsageError)
    assert "is your own file" in result.exception.message
    assert path.exists()


def test_importing_the_verb_imports_nothing_heavy() -> None:
    code = (
        "import sys, emlocal.cli.models;"
        "assert not {'huggingface_hub', 'numpy', 'rich.table', 'filelock', 'llama_cpp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path.cwd())


def test_model_folders(tmp_path: Path) -> None:
    made = unpack(resolve(str(write_tiny_gguf(tmp_path / "tiny.gguf"))))
    facts = json.loads(run("show", str(made), "--json").stdout)
    assert (facts["architecture"], facts["quantization"], facts["context_length"]) == ("llama", "F32", 256)
    assert facts["sampling"] == {"temperature": 0.5, "top_k": 20}
    assert facts["sampling_in_effect"]["top_k"] == {"value": 20, "from": "model"}
    assert facts["chat_template"] is True
    assert facts["files"] == [str(made / "model.safetensors")]
    assert run("path", str(made)).stdout == f"{made}\n"
    error = run("rm", str(made), "--yes").exception
    assert isinstance(error, UsageError)
    assert error.hint == f"delete it: rm -r {made}"


def test_cached_folders_are_listed_and_removed(tmp_path: Path) -> None:
    made = unpack(resolve(str(write_tiny_gguf(tmp_path / "tiny.gguf"))))
    cached = cache_model(tmp_path, "someone/Tiny")
    for path in made.iterdir():
        shutil.copy(path, cached / "snapshots" / ("a" * 40))
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    assert rows["someone/Tiny"]["bytes"] >= (made / "model.safetensors").stat().st_size
    assert json.loads(run("show", "someone/Tiny", "--json").stdout)["source"] == "hub"
    assert run("rm", "someone/Tiny", "--yes").exit_code == 0
    assert "someone/Tiny" not in run("list", "--json").stdout
