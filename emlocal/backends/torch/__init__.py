"""The torch engine: CUDA, and any CPU. It generates and trains."""

import os
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal.backends.engine import (
    Engine,
    Opened,
    Probe,
    Trainer,
    Verdict,
    load_unpacked,
    missing,
    wait_briefly,
)

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.backends.engine import KVType, LoadOptions
    from emlocal.backends.learner import Processes
    from emlocal.files import Progress
    from emlocal.models.header import ModelHeader
    from emlocal.models.memory import Terms
    from emlocal.models.resolve import Model

wait_briefly()  # torch reads it when it loads its OpenMP library

_INSTALL = (
    "pip install 'emlocal[torch]' (on Linux 2 GB and more, for CUDA; for the CPU alone add"
    " --extra-index-url https://download.pytorch.org/whl/cpu)"
)


def has_cuda() -> bool:
    """Returns whether there is an NVIDIA device and a torch built for it.

    It looks at files, because an import takes 1 s.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    libraries = Path(spec.origin).parent / "lib"
    if sys.platform == "win32":
        driver = Path(os.environ.get("SYSTEMROOT", "C:/Windows"), "System32", "nvcuda.dll")
        return driver.exists() and (libraries / "torch_cuda.dll").exists()
    devices = Path("/proc/driver/nvidia/gpus")
    there = Path("/usr/lib/wsl/lib/libcuda.so.1").exists() or (devices.is_dir() and any(devices.iterdir()))
    return there and (libraries / "libtorch_cuda.so").exists()


def _suits(model: str | None) -> str | None:
    from emlocal.models.resolve import is_safetensors_folder

    if model is not None and is_safetensors_folder(model):
        if not ENGINE.installed():
            what = "is a model in safetensors, which the torch engine runs; torch and transformers are"
            raise missing(f"{model} {what}", _INSTALL)
        return "for a model in safetensors"
    return "there is a CUDA device" if ENGINE.installed() and has_cuda() else None


def _check() -> None:
    if not ENGINE.installed():
        raise missing("the torch engine needs torch and transformers, which are", _INSTALL)


def _memory_terms(header: "ModelHeader", kv_type: "KVType | None") -> "Terms":
    from emlocal.backends.torch.model import memory_terms

    return memory_terms(header)


def _load(
    model: "Model", options: "LoadOptions", progress: "Progress", meanwhile: Callable[[], None]
) -> "Backend":
    from emlocal.backends.torch.backend import open_folder

    return load_unpacked(open_folder, model, options, progress)


def _verdict(said: Mapping[str, str]) -> Verdict:
    if "why" in said:
        return Verdict("fail", f"cannot be loaded: {said['why']}", (_INSTALL,))
    return Verdict("ok", f"torch {said['version']}; {said['info']}")


def _open(folder: Path, *, name: str, device: str, dtype: str, threads: int) -> Opened:
    from emlocal.backends.torch.backend import open_model

    return open_model(folder, name=name, device=device, dtype=dtype, threads=threads)


def _processes(on_cpu: bool) -> "Processes":
    try:
        from emlocal.backends.torch.processes import AcceleratedProcesses
    except ImportError:
        what = "training with several processes needs the package accelerate, which is"
        raise missing(what, "pip install accelerate") from None
    return AcceleratedProcesses(cpu=on_cpu)


ENGINE = Engine(
    name="torch",
    package="torch",
    modules=("torch", "transformers"),
    distributions=("torch", "transformers"),
    formats=("safetensors", "gguf"),
    suits=_suits,
    memory_terms=_memory_terms,
    loader=_load,
    probe=Probe("torch", "module.cuda.get_device_name() if module.cuda.is_available() else 'cpu'", _verdict),
    check=_check,
    trainer=Trainer(_open, ("em-ft", "em-rl"), _processes),
)
