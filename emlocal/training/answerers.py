"""The engines that answer a run's prompts with the adapter as it is at each step."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal.backends.base import Backend
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.gguf import GGUFHeader

if TYPE_CHECKING:
    from emlocal.backends.llama_cpp import LlamaCppBackend


class SameModel:
    """Answers with the very model that is being trained: its adapter is always the newest."""

    def __init__(self, backend: Backend, parallel: int) -> None:
        self.backend = backend
        self.parallel = parallel

    def refresh(self, adapter: Adapter) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Free the engine."""
        self.backend.close()


class LlamaCppModel:
    """Answers with the GGUF file in llama.cpp, which is given the adapter anew at each step.

    Faster than torch on CPUs without native bfloat16 (docs/performance.md). Its weights are those that
    are trained on; its activations are rounded more, so the answers come from nearly the same model.
    """

    def __init__(self, backend: "LlamaCppBackend", header: GGUFHeader, parallel: int) -> None:
        self.backend = backend
        self.parallel = parallel
        self._header = header
        self._folder = tempfile.TemporaryDirectory(prefix="emlocal-")

    def refresh(self, adapter: Adapter) -> None:
        """Answer with this adapter from now on."""
        path = Path(self._folder.name) / "adapter.gguf"
        write_gguf(adapter, path, self._header)
        self.backend.set_adapters([(path, 1.0)])

    def close(self) -> None:
        """Free the engine."""
        self.backend.close()
        self._folder.cleanup()
