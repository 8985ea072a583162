"""A model and its context on their way into memory, while Python does something else.

No numpy here: it is among what is imported meanwhile.
"""

import ctypes
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from emlocal.backends.llama_cpp.library import first_error, keep_errors, keep_nothing, load_library
from emlocal.backends.llama_cpp.trial import try_first
from emlocal.backends.options import KVType, LoadOptions, context_length
from emlocal.errors import BackendError, ModelError, UsageError
from emlocal.machine import physical_cores
from emlocal.models.resolve import GGUFModel

BATCH = 512  # tokens per llama_decode, at most
DEFAULT_KV_TYPE: KVType = "f16"
_KV_TYPES: dict[KVType, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}  # enum ggml_type


class Loaded(NamedTuple):
    """What llama.cpp has made; both pointers are for the receiver to free."""

    model: Any
    context: Any


class Loading:
    """Begins to load when it is made, after a trial in a child where the model needs one (`trial`).

    `wait` has the result.

    In a `with` block that is left by an exception, what was loaded is freed. No code of Python's runs in
    the thread between its two calls of llama.cpp, so that it does not wait for the GIL, and no signal is
    ever handled there.
    """

    def __init__(self, model: GGUFModel, options: LoadOptions) -> None:
        self.threads = options.threads or physical_cores()
        try_first(model, self.threads)
        self.lib: Any = load_library()
        self.length = context_length(options.context, model.header.context_length)
        most = self.lib.llama_max_parallel_sequences()
        if options.sequences > most:
            raise UsageError(
                f"{options.sequences} sequences at once, emlocal's own among them,"
                f" are more than llama.cpp's {most}",
                "give a smaller --parallel or --samples",
            )
        # With fewer tokens than sequences, in a batch or in the whole context, llama.cpp ends the process:
        # each sequence may want its row of logits.
        self.batch = min(BATCH, max(self.length, options.sequences))
        """Tokens per llama_decode."""
        self._files, self._kv_type = model.files, options.kv_type or DEFAULT_KV_TYPE
        self._model_params = self.lib.llama_model_default_params()
        self._context_params = self._params(options)
        self._model: Any = None
        self._context: Any = None
        keep_nothing(self.lib)  # two thousand lines
        self._thread = threading.Thread(target=self._load, name="loading")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, why: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()

    def wait(self) -> Loaded:
        """Model and context. Raises ModelError or BackendError with llama.cpp's reason."""
        try:
            self._thread.join()
        except BaseException:  # Ctrl-C
            self._abandon()
            raise
        keep_errors(self.lib)
        if not self._context:  # once more, to hear why
            self._load()
        if not self._model:
            raise ModelError(f"llama.cpp cannot load {self._files[0]}: {first_error()}")
        if not self._context:
            self.free()
            raise BackendError(
                f"llama.cpp cannot make a context of {self.length:,} tokens with {self._kv_type} keys and"
                f" values: {first_error()}",
                "try a smaller --context",
            )
        return Loaded(self._model, self._context)

    def _params(self, options: LoadOptions) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx = max(self.length, self.batch) if options.shared else self.length * options.sequences
        params.n_batch = params.n_ubatch = self.batch
        params.n_seq_max = options.sequences
        params.kv_unified = options.shared
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = _KV_TYPES[self._kv_type]
        params.no_perf = True
        return params

    def _load(self) -> None:
        self._model = self._model or load_model(self.lib, self._files, self._model_params)
        if self._model:
            self._context = self.lib.llama_init_from_model(self._model, self._context_params)

    def _abandon(self) -> None:
        self._thread.join()
        keep_errors(self.lib)
        self.free()

    def free(self) -> None:
        """Free what was loaded."""
        if self._context:
            self.lib.llama_free(self._context)
        if self._model:
            self.lib.llama_model_free(self._model)
        self._model = self._context = None


def load_model(lib: Any, files: tuple[Path, ...], params: Any) -> Any:
    """A llama_model*, null if it cannot be loaded. The files' headers have been checked before."""
    if len(files) == 1:
        return lib.llama_model_load_from_file(os.fsencode(files[0]), params)
    paths = (ctypes.c_char_p * len(files))(*(os.fsencode(f) for f in files))
    return lib.llama_model_load_from_splits(paths, len(files), params)
