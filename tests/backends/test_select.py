"""The choice of the engine, and its reason."""

from pathlib import Path

import pytest

from emlocal.backends import ENGINES, mlx, torch
from emlocal.backends.engine import Engine, engine, select_backend
from emlocal.errors import BackendError, UsageError

LLAMA_CPP = ("llama.cpp", "the engine for every CPU")


def machine(
    patch: pytest.MonkeyPatch, *, has_torch: bool, cuda: bool, has_mlx: bool = False, apple: bool = False
) -> None:
    there_is = {"torch": has_torch, "mlx": has_mlx, "llama.cpp": True}
    patch.setattr(Engine, "installed", lambda self: there_is[self.name])
    patch.setattr(torch, "has_cuda", lambda: cuda)
    patch.setattr(mlx, "on_apple_silicon", lambda: apple)


@pytest.fixture
def folder(unpacked_tiny: Path) -> str:
    return str(unpacked_tiny)


def test_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_torch, cuda, expected in (
        (True, True, "torch"),
        (True, False, "llama.cpp"),
        (False, True, "llama.cpp"),
    ):
        machine(monkeypatch, has_torch=has_torch, cuda=cuda)
        assert select_backend()[0] == select_backend("auto", "smollm2:135m")[0] == expected
    machine(monkeypatch, has_torch=True, cuda=True)
    assert select_backend()[1] == "there is a CUDA device"
    machine(monkeypatch, has_torch=True, cuda=False, has_mlx=True)
    assert select_backend() == LLAMA_CPP
    machine(monkeypatch, has_torch=True, cuda=False, apple=True)
    assert select_backend() == LLAMA_CPP


def test_by_the_model(monkeypatch: pytest.MonkeyPatch, folder: str, tmp_path: Path) -> None:
    machine(monkeypatch, has_torch=True, cuda=False)
    assert select_backend("auto", folder) == ("torch", "for a model in safetensors")
    (tmp_path / "empty").mkdir()
    for other in (
        "",
        " ",
        "\0",
        "no/such/folder",
        str(tmp_path / "empty"),
        folder + "/config.json",
        "a" * 999,
    ):
        assert select_backend("auto", other) == LLAMA_CPP
    machine(monkeypatch, has_torch=False, cuda=False)
    with pytest.raises(BackendError, match=r"in safetensors, which the torch engine runs"):
        select_backend("auto", folder)
    assert select_backend("llama.cpp", folder) == ("llama.cpp", "asked for")


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, has_torch=True, cuda=True)
    assert select_backend("llama.cpp") == ("llama.cpp", "asked for")
    assert select_backend("torch") == ("torch", "asked for")
    machine(monkeypatch, has_torch=False, cuda=False)
    with pytest.raises(BackendError, match="not installed") as caught:
        select_backend("torch")
    assert "pip install" in caught.value.hint
    with pytest.raises(UsageError, match="there is no engine vllm"):
        select_backend("vllm")


def test_mlx(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    machine(monkeypatch, has_torch=False, cuda=False, has_mlx=True)
    assert select_backend("mlx") == ("mlx", "asked for")
    machine(monkeypatch, has_torch=True, cuda=False, has_mlx=True, apple=True)
    for model in (None, "smollm2:135m", folder):
        assert select_backend("auto", model) == ("mlx", "this machine is Apple Silicon")


def test_mlx_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, has_torch=True, cuda=True)
    with pytest.raises(BackendError, match="needs mlx-lm, which is not installed") as caught:
        select_backend("mlx")
    assert caught.value.hint == "pip install 'emlocal[mlx]'"
    for platform, where in (("win32", "Windows"), ("darwin", "Macs with Intel processors")):
        monkeypatch.setattr(mlx.sys, "platform", platform)
        with pytest.raises(BackendError, match=f"MLX does not run on {where}") as caught:
            select_backend("mlx")
        assert caught.value.hint == "use --backend llama.cpp, or leave it out"


def test_the_records() -> None:
    records = {name: engine(name) for name in ENGINES}
    assert all(record.name == name for name, record in records.items())
    assert {name: record.formats for name, record in records.items()} == {
        "llama.cpp": ("gguf",),
        "mlx": ("safetensors", "gguf"),
        "torch": ("safetensors", "gguf"),
    }
    shared, own = ({name: r.contexts_to_reserve(5, s) for name, r in records.items()} for s in (True, False))
    assert shared == {"llama.cpp": 1, "mlx": 5, "torch": 5}
    assert own == {"llama.cpp": 5, "mlx": 5, "torch": 5}
    trained = {name: r.trainer.methods for name, r in records.items() if r.trainer is not None}
    assert trained == {"mlx": ("em-ft",), "torch": ("em-ft", "em-rl")}
    assert [name for name, record in records.items() if record.bare_loop] == ["llama.cpp"]
    assert all(record.installed() for record in records.values())
