"""llama.cpp through llama-cpp-python's low-level bindings: our own decode loop on its C functions."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from emlocal.backends.engine import Engine, Probe, Verdict

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.backends.llama_cpp.backend import LlamaCppBackend
    from emlocal.backends.options import KVType, LoadOptions
    from emlocal.models.header import ModelHeader
    from emlocal.models.memory import Terms
    from emlocal.models.paths import Progress
    from emlocal.models.resolve import Model

__all__ = ["ENGINE", "LlamaCppBackend"]


def __getattr__(name: str) -> object:
    """The engine, imported when first used: its model is being loaded before numpy is imported."""
    if name != "LlamaCppBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from emlocal.backends.llama_cpp.backend import LlamaCppBackend

    return LlamaCppBackend


def _load(
    model: "Model", options: "LoadOptions", progress: "Progress", meanwhile: Callable[[], None]
) -> "Backend":
    """`meanwhile` runs while llama.cpp reads the file."""
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


def _bare_loop(backend: Any, sequence: int, token: int, steps: int) -> list[float]:
    from emlocal.backends.llama_cpp.backend import bare_decode

    return bare_decode(backend, sequence, token, steps)


def _verdict(said: Mapping[str, str]) -> Verdict:
    from emlocal.backends.llama_cpp.doctor import verdict

    return verdict(said)


ENGINE = Engine(
    name="llama.cpp",
    package="llama-cpp-python",
    modules=("llama_cpp",),
    distributions=("llama-cpp-python",),
    formats=("gguf",),
    suits=lambda model: "the engine for any CPU",
    memory_terms=_memory_terms,
    loader=_load,
    probe=Probe("llama_cpp", "module.llama_print_system_info().decode()", _verdict, always=True),
    shares_context=True,
    bare_loop=_bare_loop,
)
