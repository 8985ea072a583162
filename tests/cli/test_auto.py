"""`-m auto`: which model it means, and that nothing is fetched without a question."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from emlocal import loading
from emlocal.errors import ModelError, UsageError
from emlocal.models.choice import Room
from emlocal.models.resolve import CatalogEntry, catalog
from emlocal.settings.options import EngineOptions
from tests.cli.conftest import Outcome, emlocal, tiny

__all__ = ["emlocal", "tiny"]
AUTO = EngineOptions("auto")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 6 GB free and nothing fetched."""
    monkeypatch.setattr(loading, "room_here", lambda: Room(6 * 10**9))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def put(tmp_path: Path, entry: CatalogEntry, file: str) -> None:
    from tests.cli.test_models import cache_model

    cache_model(tmp_path, entry.gguf, file)


def test_without_a_terminal_nothing_is_fetched(emlocal: Callable[..., Outcome]) -> None:
    done = emlocal("generate", "-m", "auto", "hi")
    assert done.code == 1
    assert done.out == ""
    assert done.err.splitlines() == [
        "error: -m auto means qwen3.5:4b here, which is not on this machine",
        "  fix: fetch it (2.7 GB): emlocal models pull qwen3.5:4b",
    ]


def test_a_model_that_is_here_is_used(emlocal: Callable[..., Outcome], tmp_path: Path) -> None:
    put(tmp_path, catalog()["qwen3.5:4b"], "Qwen3.5-4B-Q4_K_M.gguf")
    flags = ("--raw", "--max-tokens", "1", "--threads", "1")
    done = emlocal("generate", "-m", "auto", *flags, "x")
    assert done.code == 0, done.err
    assert "qwen3.5:4b (F32) on llama.cpp" in done.err


@pytest.mark.parametrize("answer", [True, False])
def test_on_a_terminal_it_asks(answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from emlocal.cli.options import _may_fetch

    asked: list[str] = []

    def confirm(text: str, *, err: bool) -> bool:
        asked.append(text)
        return answer

    monkeypatch.setattr(typer, "confirm", confirm)
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    if answer:
        found = loading.settled(AUTO, _may_fetch)
        assert (found.model, found.backend) == ("qwen3.5:4b", "llama.cpp")
    else:
        with pytest.raises(ModelError, match="not on this machine"):
            loading.settled(AUTO, _may_fetch)
    assert asked == [
        "The best model that fits here is qwen3.5:4b (4B parameters, 2.7 GB, Apache-2.0). Fetch it?"
    ]


def test_offline_it_does_not_ask() -> None:
    with pytest.raises(ModelError, match="not on this machine"):
        loading.settled(EngineOptions("auto", offline=True), lambda entry: pytest.fail("it asked"))


def test_capitals_do_not_matter(tmp_path: Path) -> None:
    put(tmp_path, catalog()["qwen3.5:4b"], "Qwen3.5-4B-Q4_K_M.gguf")
    assert loading.settled(EngineOptions("Auto")).model == "qwen3.5:4b"


def test_models_show_and_path_know_the_name(emlocal: Callable[..., Outcome], tmp_path: Path) -> None:
    shown = emlocal("models", "show", "auto")
    assert shown.out.splitlines()[0].split() == ["name", "qwen3.5:4b"]
    assert "fetch it: emlocal models pull qwen3.5:4b" in shown.err
    assert emlocal("models", "path", "auto").code == 1
    put(tmp_path, catalog()["qwen3.5:4b"], "Qwen3.5-4B-Q4_K_M.gguf")
    for command in ("path", "pull"):
        assert emlocal("models", command, "auto").out.strip().endswith("Qwen3.5-4B-Q4_K_M.gguf")


def test_other_names_stay() -> None:
    for name in (None, "qwen3:4b", "Auto-org/auto"):
        assert loading.settled(EngineOptions(name)) == EngineOptions(name)
    Path("auto").write_bytes(b"")
    assert loading.settled(AUTO) == AUTO, "a file of that name comes first"


def test_it_is_for_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="and --backend is torch"):
        loading.settled(EngineOptions("auto", "torch"))
    monkeypatch.setattr(loading, "room_here", lambda: Room(10**8))
    with pytest.raises(ModelError, match="no model of the catalogue fits into 100 MB of free memory"):
        loading.settled(AUTO)
