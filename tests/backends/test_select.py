"""Which engine is chosen, and why."""

from pathlib import Path

import pytest

from emlocal.backends import select
from emlocal.backends.select import formats_of, rooms, select_backend
from emlocal.errors import BackendError, UsageError

LLAMA_CPP = ("llama.cpp", "the engine for any CPU")


def machine(
    patch: pytest.MonkeyPatch, *, torch: bool, cuda: bool, mlx: bool = False, apple: bool = False
) -> None:
    there_is = {"has_torch": torch, "has_mlx": mlx, "has_cuda": cuda, "on_apple_silicon": apple}
    for name, there in there_is.items():
        patch.setattr(select, name, lambda there=there: there)


@pytest.fixture
def folder(unpacked_tiny: Path) -> str:
    return str(unpacked_tiny)


def test_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for torch, cuda, engine in (
        (True, True, "torch"),
        (True, False, "llama.cpp"),
        (False, True, "llama.cpp"),
    ):
        machine(monkeypatch, torch=torch, cuda=cuda)
        assert select_backend()[0] == select_backend("auto", "smollm2:135m")[0] == engine
    machine(monkeypatch, torch=True, cuda=True)
    assert select_backend()[1] == "there is a CUDA device"
    machine(monkeypatch, torch=True, cuda=False, mlx=True)
    assert select_backend() == LLAMA_CPP
    machine(monkeypatch, torch=True, cuda=False, apple=True)
    assert select_backend() == LLAMA_CPP


def test_by_the_model(monkeypatch: pytest.MonkeyPatch, folder: str, tmp_path: Path) -> None:
    machine(monkeypatch, torch=True, cuda=False)
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
    machine(monkeypatch, torch=False, cuda=False)
    with pytest.raises(BackendError, match=r"in safetensors, which the torch engine runs"):
        select_backend("auto", folder)
    assert select_backend("llama.cpp", folder) == ("llama.cpp", "asked for")


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, torch=True, cuda=True)
    assert select_backend("llama.cpp") == ("llama.cpp", "asked for")
    assert select_backend("torch") == ("torch", "asked for")
    machine(monkeypatch, torch=False, cuda=False)
    with pytest.raises(BackendError, match="not installed") as caught:
        select_backend("torch")
    assert "pip install" in caught.value.hint
    with pytest.raises(UsageError, match="there is no engine vllm"):
        select_backend("vllm")


def test_mlx(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    machine(monkeypatch, torch=False, cuda=False, mlx=True)
    assert select_backend("mlx") == ("mlx", "asked for")
    machine(monkeypatch, torch=True, cuda=False, mlx=True, apple=True)
    for model in (None, "smollm2:135m", folder):
        assert select_backend("auto", model) == ("mlx", "this is Apple Silicon")


def test_mlx_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, torch=True, cuda=True)
    with pytest.raises(BackendError, match="needs mlx-lm, which is not installed") as caught:
        select_backend("mlx")
    assert caught.value.hint == "pip install 'emlocal[mlx]'"
    for platform, where in (("win32", "Windows"), ("darwin", "Macs with Intel processors")):
        monkeypatch.setattr(select.sys, "platform", platform)
        with pytest.raises(BackendError, match=f"MLX does not run on {where}") as caught:
            select_backend("mlx")
        assert caught.value.hint == "use --backend llama.cpp, or leave it out"


def test_formats_and_rooms() -> None:
    assert formats_of("torch") == ("safetensors", "gguf")
    assert formats_of("llama.cpp") == ("gguf",)
    assert formats_of("mlx") == ("safetensors", "gguf")
    assert [rooms("llama.cpp", 5, shared) for shared in (True, False)] == [1, 5]
    assert [rooms(name, 5, shared) for name in ("torch", "mlx") for shared in (True, False)] == [5] * 4
