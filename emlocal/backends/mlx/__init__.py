"""The MLX engine: Apple Silicon, and on Linux the CPU, for tests. It generates, and trains by EM-FT."""

import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal.backends.engine import Engine, Opened, Probe, Trainer, Verdict, load_unpacked, missing
from emlocal.errors import BackendError

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.backends.engine import KVType, LoadOptions
    from emlocal.files import Progress
    from emlocal.models.header import ModelHeader
    from emlocal.models.memory import Terms
    from emlocal.models.resolve import Model


def on_apple_silicon() -> bool:
    """Returns whether this is a Mac with an Apple processor."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _suits(model: str | None) -> str | None:
    return "this machine is Apple Silicon" if on_apple_silicon() and ENGINE.installed() else None


def _check() -> None:
    if sys.platform == "win32" or (sys.platform == "darwin" and not on_apple_silicon()):
        where = "Windows" if sys.platform == "win32" else "Macs with Intel processors"
        raise BackendError(f"MLX does not run on {where}", "use --backend llama.cpp, or leave it out")
    if not ENGINE.installed():
        raise missing("the mlx engine needs mlx-lm, which is", "pip install 'emlocal[mlx]'")


def _memory_terms(header: "ModelHeader", kv_type: "KVType | None") -> "Terms":
    from emlocal.backends.mlx.model import memory_terms

    return memory_terms(header)


def _load(
    model: "Model", options: "LoadOptions", progress: "Progress", meanwhile: Callable[[], None]
) -> "Backend":
    from emlocal.backends.mlx.backend import open_folder

    return load_unpacked(open_folder, model, options, progress)


def _verdict(said: Mapping[str, str]) -> Verdict:
    from emlocal.machine import installer

    if "why" in said:
        line = f"{' '.join(installer())} --force-reinstall mlx mlx-lm"
        return Verdict("fail", f"cannot be loaded: {said['why']}", (line,))
    return Verdict("ok", f"mlx-lm {said['version']}; {said['info']}")


def _open(folder: Path, *, name: str, device: str, dtype: str, threads: int) -> Opened:
    """Opens a model; `threads` is ignored, because MLX chooses its threads itself."""
    from emlocal.backends.mlx.backend import open_model

    return open_model(folder, name=name, device=device, dtype=dtype)


ENGINE = Engine(
    name="mlx",
    package="mlx-lm",
    modules=("mlx", "mlx_lm", "tokenizers"),
    distributions=("mlx", "mlx-lm"),
    formats=("safetensors", "gguf"),
    suits=_suits,
    memory_terms=_memory_terms,
    loader=_load,
    probe=Probe("mlx_lm", "__import__('mlx.core').core.default_device()", _verdict),
    check=_check,
    trainer=Trainer(_open, ("em-ft",)),
)
