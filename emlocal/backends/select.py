"""Which engine runs, and why."""

import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal.backends.options import KVType, LoadOptions
from emlocal.errors import BackendError, UsageError
from emlocal.models.header import ModelHeader
from emlocal.models.memory import KV_TYPE_BYTES, Terms, terms
from emlocal.models.resolve import FolderModel, Format, GGUFModel, Model, is_safetensors_folder
from emlocal.models.storage import Progress, silent

if TYPE_CHECKING:
    from emlocal.backends.base import Backend


def on_apple_silicon() -> bool:
    """Whether this is a Mac with an Apple processor."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def has_torch() -> bool:
    """Whether the torch engine's packages are installed; they are not imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))


def has_mlx() -> bool:
    """Whether the mlx engine's packages are installed; they are not imported."""
    names = ("mlx", "mlx_lm", "tokenizers")
    return all(importlib.util.find_spec(name) is not None for name in names)


def has_cuda() -> bool:
    """Whether there is an NVIDIA device and a torch built for it, by files: an import takes 1 s."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    libraries = Path(spec.origin).parent / "lib"
    if sys.platform == "win32":
        driver = Path(os.environ.get("SYSTEMROOT", "C:/Windows"), "System32", "nvcuda.dll")
        return driver.exists() and (libraries / "torch_cuda.dll").exists()
    devices = Path("/proc/driver/nvidia/gpus")
    there = Path("/usr/lib/wsl/lib/libcuda.so.1").exists() or (devices.is_dir() and any(devices.iterdir()))
    return there and (libraries / "libtorch_cuda.so").exists()


def select_backend(asked: str = "auto", model: str | None = None) -> tuple[str, str]:
    """The engine to use and the reason for it. `model`: what it is to run, as the user names it.

    Raises UsageError for an engine that this version does not have, BackendError for one whose packages are
    not installed.
    """
    if asked == "llama.cpp":
        return "llama.cpp", "asked for"
    if asked == "torch":
        _check_torch("the torch engine needs torch and transformers, which are not installed")
        return "torch", "asked for"
    if asked == "mlx":
        _check_mlx()
        return "mlx", "asked for"
    if asked != "auto":
        raise UsageError(
            f"there is no engine {asked}", "use --backend llama.cpp, torch or mlx, or leave it out"
        )
    if on_apple_silicon() and has_mlx():
        return "mlx", "this is Apple Silicon"
    if model is not None and is_safetensors_folder(model):
        _check_torch(
            f"{model} is a model in safetensors, which the torch engine runs; torch and transformers are not"
            " installed"
        )
        return "torch", "for a model in safetensors"
    if has_torch() and has_cuda():
        return "torch", "there is a CUDA device"
    return "llama.cpp", "the engine for any CPU"


def _check_mlx() -> None:
    """Raise BackendError, with what to do, where the mlx engine cannot run."""
    if sys.platform == "win32" or (sys.platform == "darwin" and not on_apple_silicon()):
        where = "Windows" if sys.platform == "win32" else "Macs with Intel processors"
        raise BackendError(f"MLX does not run on {where}", "use --backend llama.cpp, or leave it out")
    if not has_mlx():
        raise BackendError(
            "the mlx engine needs mlx-lm, which is not installed", "pip install 'emlocal[mlx]'"
        )


def _check_torch(missing: str) -> None:
    if not has_torch():
        raise BackendError(
            missing,
            "pip install 'emlocal[torch]' (on Linux 2 GB and more, for CUDA; for the CPU alone add"
            " --extra-index-url https://download.pytorch.org/whl/cpu)",
        )


def bare_loop(backend: "Backend") -> Callable[[int, int, int], list[float]] | None:
    """The engine's decoding with an argmax and nothing else, which `emlocal bench` compares with.

    It takes a sequence, a token and a number of steps, and gives the seconds of each step. None where the
    engine has no such loop.
    """
    if backend.name != "llama.cpp":
        return None
    from emlocal.backends.llama_cpp.backend import LlamaCppBackend
    from emlocal.backends.llama_cpp.bare import bare_decode

    assert isinstance(backend, LlamaCppBackend)
    return partial(bare_decode, backend)


def formats_of(name: str) -> tuple[Format, ...]:
    """The formats of models that an engine runs, the one it likes best first."""
    return ("gguf",) if name == "llama.cpp" else ("safetensors", "gguf")


def memory_terms(name: str, header: ModelHeader, kv_type: KVType | None) -> Terms:
    """What an estimate of the memory that a model takes in an engine goes by."""
    if name == "torch":
        from emlocal.backends.torch.device import memory_terms as on_device

        return on_device(header)
    if name == "mlx":
        from emlocal.backends.mlx.device import memory_terms as on_mlx

        return on_mlx(header)
    return terms(header, KV_TYPE_BYTES[kv_type or "f16"])


def rooms(name: str, sequences: int, shared: bool) -> int:
    """For how many whole contexts there must be memory: sequences of torch and mlx share none
    (LoadOptions.shared)."""
    return 1 if shared and name == "llama.cpp" else sequences


def load_backend(
    name: str,
    model: Model,
    options: LoadOptions,
    progress: Progress = silent,
    meanwhile: Callable[[], None] = lambda: None,
) -> "Backend":
    """Load a model. `name` is what `select_backend` answered; the model has one of its formats.

    `meanwhile` runs while llama.cpp reads the file.
    """
    if name == "llama.cpp":
        from emlocal.backends.llama_cpp.loading import Loading

        assert isinstance(model, GGUFModel)
        with Loading(model, options) as loading:
            from emlocal.backends.llama_cpp.backend import LlamaCppBackend

            meanwhile()
            return LlamaCppBackend(model, options, loading)
    if name not in ("torch", "mlx"):
        raise UsageError(f"there is no engine called {name}")
    from emlocal.models.unpacked import unpack

    open_folder: Callable[..., Backend]
    if name == "torch":
        from emlocal.backends.torch.load import open_folder as open_in_torch

        open_folder = open_in_torch
    else:
        from emlocal.backends.mlx.load import open_folder as open_in_mlx

        open_folder = open_in_mlx
    if isinstance(model, FolderModel):
        return open_folder(model.path, options, name=model.header.name)
    shown = model.path.name if model.source == "path" else model.name
    return open_folder(unpack(model, progress), options, name=shown, base=model.header)
