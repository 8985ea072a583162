"""llama.cpp through llama-cpp-python's low-level bindings: our own decode loop on its C functions."""

from emlocal.backends.llama_cpp.backend import LlamaCppBackend
from emlocal.backends.llama_cpp.bare import bare_decode

__all__ = ["LlamaCppBackend", "bare_decode"]
