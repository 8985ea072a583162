"""The command line, run in-process on a tiny real model."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from emlocal import console
from emlocal.cli.app import run
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.models.unpacked import unpack
from tests.tiny_gguf import write_tiny_gguf
from tests.tiny_pair import ModelPair


@dataclass
class Outcome:
    """The result of a run of the command line."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a tiny model that real llama.cpp runs."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_tiny_gguf(path)
    return str(path)


@pytest.fixture(scope="session")
def folder(pair: ModelPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face folder with its tokenizer."""
    model = resolve(str(pair.gguf))
    assert isinstance(model, GGUFModel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMLOCAL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return unpack(model)


@pytest.fixture
def emlocal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Outcome]:
    """Runs `emlocal` with arguments, in folders of its own; stdin is empty unless given."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"EMLOCAL_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("COLUMNS", "200")

    def go(*arguments: str, stdin: str | bytes = b"") -> Outcome:
        console.err.cache_clear()
        console.out.cache_clear()
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", _Stdin(raw))
        code = run(list(arguments))
        captured = capsys.readouterr()
        console.err.cache_clear()
        console.out.cache_clear()
        return Outcome(code, captured.out, captured.err)

    return go


class _Stdin(io.TextIOWrapper):
    """Bytes as a stdin that `select` accepts: a real file descriptor, always ready."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))

    def fileno(self) -> int:
        return _READY


_READY_FILE = Path(__file__).open("rb")  # noqa: SIM115
_READY = _READY_FILE.fileno()
