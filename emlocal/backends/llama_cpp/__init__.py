"""llama.cpp through llama-cpp-python's low-level bindings: our own decode loop on its C functions.

This module has the engine's record, the verdict of `emlocal doctor` on the bindings, and the commands that
fix them.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from emlocal import machine
from emlocal.backends.engine import Engine, Probe, Verdict
from emlocal.backends.llama_cpp.loading import REQUIREMENT

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.backends.engine import KVType, LoadOptions, OffloadOptions
    from emlocal.backends.llama_cpp.backend import LlamaCppBackend
    from emlocal.files import Progress
    from emlocal.models.header import ModelHeader
    from emlocal.models.memory import Terms
    from emlocal.models.resolve import Model


_WHEELS = "https://abetlen.github.io/llama-cpp-python/whl"
WHEEL_INDEX = f"{_WHEELS}/cpu"
GPU_WHEELS = {"CUDA 13": "cu130", "CUDA 12": "cu125", "Vulkan": "vulkan", "Metal": "metal"}
"""The wheels for GPUs on the authors' index, by what computes."""


def verdict(said: Mapping[str, str]) -> Verdict:
    """Returns the verdict on the test of the bindings; see `Probe`."""
    if "why" in said:
        return Verdict("fail", f"cannot be loaded: {said['why']}", _fix(said["why"]))
    version = said["version"]
    if not (0, 3, 36) <= _release(version) < (0, 4):
        text = f"llama-cpp-python {version}; emlocal needs 0.3.36 to 0.3.x"
        return Verdict("fail", text, (install_lines()[0],))
    text = f"llama-cpp-python {version}; {' '.join(used_features(said['info']))}"
    unused = unused_features(machine.cpu().features, said["info"])
    if unused:
        text += f"; built without {' and '.join(unused)}, which this processor has: slow"
        return Verdict("warn", text, (rebuild_line(native=True),))
    return Verdict("ok", text)


def used_features(system_info: str) -> list[str]:
    """Returns the features that llama.cpp was built with: the names that it sets to 1."""
    return re.findall(r"(\w+) = 1", system_info)


def unused_features(features: tuple[str, ...], system_info: str) -> list[str]:
    """Returns processor features that make a large difference and that this build does not use."""
    used = used_features(system_info)
    return [f for f in ("AVX", "AVX2", "NEON") if f in features and f not in used]


def install_lines() -> list[str]:
    """Returns the two commands that install llama.cpp's bindings: building them here, or a ready wheel."""
    base = [*machine.installer(), REQUIREMENT]
    return [machine.line(base), machine.line([*base, "--extra-index-url", WHEEL_INDEX])]


def gpu_install_lines() -> list[str]:
    """Returns the commands that install wheels for GPUs on this system, each with what it is for."""
    uv = machine.installer()[0] == "uv"
    again = ["--reinstall-package", "llama-cpp-python"] if uv else ["--force-reinstall", "--no-deps"]
    base = [*machine.installer(), *again, "--only-binary", "llama-cpp-python", REQUIREMENT]
    apple = sys.platform == "darwin"
    return [
        f"{kind}: {machine.line([*base, '--extra-index-url', f'{_WHEELS}/{tag}'])}"
        for kind, tag in GPU_WHEELS.items()
        if (kind == "Metal") == apple
    ]


def rebuild_line(*, native: bool = False) -> str:
    """Returns the command that rebuilds the bindings for this processor."""
    uv = machine.installer()[0] == "uv"
    again = ["--reinstall", "--no-cache"] if uv else ["--force-reinstall", "--no-deps", "--no-cache-dir"]
    line = machine.line([*machine.installer(), *again, "--no-binary", "llama-cpp-python", REQUIREMENT])
    return f"CMAKE_ARGS=-DGGML_NATIVE=on {line}" if native and os.name == "posix" else line


def _fix(why: str) -> tuple[str, ...]:
    """Returns the fix for llama.cpp's bindings that cannot be imported."""
    if "No module named 'llama_cpp'" in why:
        compiler = () if machine.compilers() else tuple(machine.compiler_lines())
        built, wheel = install_lines()
        return (*compiler, built, f"or, without a compiler: {wheel}")
    openmp = machine.openmp_line()
    if "libgomp" in why and openmp:
        return (openmp,)
    compiler = () if machine.compilers() else tuple(machine.compiler_lines())
    return (*compiler, rebuild_line())


def _release(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) if part.isdigit() else 0 for part in parts)


__all__ = ["ENGINE", "LlamaCppBackend"]


def __getattr__(name: str) -> object:
    """Returns the engine's class, imported when it is first used.

    Loading of its model begins before numpy is imported.
    """
    if name != "LlamaCppBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from emlocal.backends.llama_cpp.backend import LlamaCppBackend

    return LlamaCppBackend


def _load(
    model: "Model", options: "LoadOptions", progress: "Progress", meanwhile: Callable[[], None]
) -> "Backend":
    """Loads a model; `meanwhile` runs while llama.cpp reads the file."""
    from emlocal.backends.llama_cpp.loading import Loading
    from emlocal.models.resolve import GGUFModel

    assert isinstance(model, GGUFModel)
    with Loading(model, options) as loading:
        from emlocal.backends.llama_cpp.backend import LlamaCppBackend

        meanwhile()
        return LlamaCppBackend(model, options, loading)


def _memory_terms(header: "ModelHeader", kv_type: "KVType | None") -> "Terms":
    from emlocal.models.memory import KV_TYPE_BYTES, terms

    return terms(header, KV_TYPE_BYTES[kv_type or "f16"])


def _moved(
    header: "ModelHeader", kv_type: "KVType | None", asked: "OffloadOptions"
) -> "Callable[[int], int]":
    """Returns the function from tokens in the cache to bytes on GPUs."""
    from emlocal.backends.llama_cpp.devices import gpus_here, place
    from emlocal.models.gguf import GGUFHeader

    assert isinstance(header, GGUFHeader)
    found = gpus_here()
    if not found:
        return lambda tokens: 0
    return lambda tokens: place(header, asked, found, tokens, kv_type or "f16").moved


def _bare_loop(backend: Any, sequence: int, token: int, steps: int) -> list[float]:
    from emlocal.backends.llama_cpp.backend import bare_decode

    return bare_decode(backend, sequence, token, steps)


ENGINE = Engine(
    name="llama.cpp",
    package="llama-cpp-python",
    modules=("llama_cpp",),
    distributions=("llama-cpp-python",),
    formats=("gguf",),
    suits=lambda model: "the engine for every CPU",
    memory_terms=_memory_terms,
    loader=_load,
    probe=Probe("llama_cpp", "module.llama_print_system_info().decode()", verdict, always=True),
    moved=_moved,
    shares_context=True,
    bare_loop=_bare_loop,
)
