"""llama.cpp through llama-cpp-python's low-level bindings: our own decode loop on its C functions."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emlocal.backends.llama_cpp.backend import LlamaCppBackend

__all__ = ["LlamaCppBackend"]


def __getattr__(name: str) -> object:
    """The engine, imported when first used: its model is being loaded before numpy is imported."""
    if name != "LlamaCppBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from emlocal.backends.llama_cpp.backend import LlamaCppBackend

    return LlamaCppBackend
