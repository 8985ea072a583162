"""generate, chat and batch on the torch engine: model folders, GGUF files, adapters, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from emlocal.backends.engine import Engine
from emlocal.models.adapters.folders import write_peft
from tests.cli.conftest import Outcome
from tests.tiny_pair import random_adapter

Emlocal = Callable[..., Outcome]
SHORT = ("--max-tokens", "12", "--seed", "7")
TORCH = ("--backend", "torch")


@pytest.fixture
def folder(unpacked_tiny: Path) -> str:
    return str(unpacked_tiny)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "installed", lambda self: self.name != "torch")


def test_a_folder_and_a_gguf_file_of_the_same_weights_say_the_same(
    emlocal: Emlocal, folder: str, tiny: str, tmp_path: Path
) -> None:
    for more in (("--em-inf",), ("--temp", "0"), ("--adaptive-temp", "--repeat-penalty", "1.2")):
        said = emlocal("generate", "-m", folder, *TORCH, *SHORT, *more, "hello")
        assert said.code == 0, said.err
        assert "on torch, asked for; context 256 tokens, cpu, " in said.err
        assert emlocal("generate", "-m", tiny, *TORCH, *SHORT, *more, "hello").out == said.out != "\n"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["unpacked"]


def test_em_is_counted_as_in_other_engines(emlocal: Emlocal, folder: str) -> None:
    done = emlocal(
        "generate", "-m", folder, *TORCH, "--em-inf", "--temp", "3", "--json", *SHORT, "-n", "2", "hello"
    )
    value = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert len({c["text"] for c in value["completions"]}) == 2
    for completion in value["completions"]:
        assert completion["entropy"]["mean_after"] < completion["entropy"]["mean_before"]


def test_adapters(emlocal: Emlocal, folder: str, tiny: str, tmp_path: Path) -> None:
    write_peft(random_adapter(layers=1), tmp_path / "good")
    write_peft(random_adapter(layers=2), tmp_path / "wrong")
    common = (*TORCH, "--temp", "0", *SHORT, "hello")

    def said(model: str, *adapters: str) -> Outcome:
        flags = [part for adapter in adapters for part in ("--adapter", adapter)]
        return emlocal("generate", "-m", model, *flags, *common)

    good = str(tmp_path / "good")
    for model in (folder, tiny):
        with_it = said(model, good)
        assert ", 1 adapter" in with_it.err
        assert with_it.out != said(model).out == said(model, f"{good}=0").out
        assert said(model, f"{good}=0.5", f"{good}=0.5").out == with_it.out
        wrong = said(model, str(tmp_path / "wrong"))
        assert (wrong.code, wrong.out) == (1, "")
        assert "which the model does not have" in wrong.err or "tiny.gguf does not have" in wrong.err
        assert "Traceback" not in wrong.err


def test_a_turn_of_chat(emlocal: Emlocal, folder: str) -> None:
    done = emlocal("chat", "-m", folder, *TORCH, "--em-inf", *SHORT, stdin="hello\n/stats\n")
    assert done.code == 0
    assert done.out.strip()
    assert "chat: 1 answer, " in done.err
    assert done.out == emlocal("chat", "-m", folder, *TORCH, "--em-inf", *SHORT, stdin="hello\n").out


def test_batch(emlocal: Emlocal, folder: str, tiny: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"custom_id": f"q{i}", "prompt": "a" * i}) + "\n" for i in range(7)))

    def texts(model: str, *more: str) -> list[str | None]:
        done = emlocal(
            "batch", "-m", model, *TORCH, *SHORT, *more, "--em-inf", "--ordered", "-q", str(source)
        )
        rows = [json.loads(line) for line in done.out.splitlines()]
        assert [row["custom_id"] for row in rows] == [f"q{i}" for i in range(7)]
        assert done.code == 1  # the first prompt is empty
        return [row.get("text") for row in rows]

    together = texts(folder, "--parallel", "4")
    assert together[0] is None
    assert len(set(together)) > 4
    assert texts(tiny, "--parallel", "4") == together
    shown = emlocal("batch", "-m", folder, *TORCH, "--dry-run", str(source))
    assert "lines" in shown.out


def test_a_folder_takes_the_torch_engine_unasked(emlocal: Emlocal, folder: str) -> None:
    done = emlocal("generate", "-m", folder, *SHORT, "hello")
    assert done.code == 0
    assert "on torch, for a model in safetensors; " in done.err


def test_a_folder_with_gguf_in_it_stays_with_llama_cpp(
    emlocal: Emlocal, folder: str, tiny: str, tmp_path: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    shutil.copy(tiny, both)
    done = emlocal("generate", "-m", str(both), *SHORT, "hello")
    assert done.code == 0
    assert "on llama.cpp, " in done.err


def test_a_folder_with_llama_cpp_says_what_runs_it(emlocal: Emlocal, folder: str) -> None:
    done = emlocal("generate", "-m", folder, "--backend", "llama.cpp", "x")
    assert (done.code, done.out) == (2, "")
    assert "in safetensors, which llama.cpp does not run" in done.err
    assert "--backend torch" in done.err


@pytest.mark.usefixtures("no_torch")
@pytest.mark.parametrize("asked", [TORCH, ()])
def test_without_torch_it_says_what_to_install(emlocal: Emlocal, folder: str, asked: tuple[str, ...]) -> None:
    done = emlocal("generate", "-m", folder, *asked, "x")
    assert (done.code, done.out) == (1, "")
    assert done.err.count("error: ") == 1
    assert "torch and transformers" in done.err
    assert "pip install 'emlocal[torch]'" in done.err
    if not asked:
        assert f"{folder} is a model in safetensors" in done.err


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_keys_and_values_in_another_format(emlocal: Emlocal, folder: str, kv_type: str) -> None:
    done = emlocal("generate", "-m", folder, *TORCH, "--kv-type", kv_type, "x")
    assert (done.code, done.out) == (2, "")
    assert (
        f"--kv-type is {kv_type}; the torch engine keeps keys and values in the model's own format"
        in done.err
    )
    assert "leave --kv-type out" in done.err
