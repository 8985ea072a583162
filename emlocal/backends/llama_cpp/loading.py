"""A model and its context on their way into memory, while Python does something else.

No numpy here: it is among what is imported meanwhile.

The shared library: finding it, starting it, and what it logs.
"""

import ctypes
import os
import sys
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

from emlocal.backends.engine import wait_briefly
from emlocal.backends.llama_cpp.trial import try_first
from emlocal.backends.options import KVType, LoadOptions, context_length
from emlocal.errors import BackendError, ModelError, UsageError
from emlocal.machine import physical_cores
from emlocal.models.gguf.header import shown
from emlocal.models.resolve import GGUFModel

_LOG: list[str] = []
_MOST_LINES = 40
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_SAID_ANYWAY = "llama_model_load: error loading model: "  # before what makes llama.cpp refuse a model

REQUIREMENT = "llama-cpp-python>=0.3.36,<0.4"
INSTALL = (
    f"pip install '{REQUIREMENT}' (it compiles, and needs a C++ compiler: `emlocal doctor`"
    " names the package for this system)"
)


@cache
def load_library() -> ModuleType:
    """The ctypes module, started. Raises BackendError where it is missing."""
    wait_briefly()
    try:
        lib: Any = _declarations()
    except (ImportError, OSError, RuntimeError, AttributeError) as why:  # the last: a symbol is missing
        raise BackendError(f"the llama.cpp engine cannot be loaded: {why}", INSTALL) from why
    keep_errors(lib)
    lib.llama_backend_init()
    return lib  # type: ignore[no-any-return]


def _declarations() -> ModuleType:
    """llama_cpp.llama_cpp, the C functions, without the package around it.

    The package would import its Llama class, chat formats and all that they need: 25 ms. So an empty module
    stands for it while its part is imported. Who imports llama_cpp later gets the whole of it, with
    declarations of its own for the same library.
    """
    if "llama_cpp" in sys.modules or threading.active_count() > 1:  # no other thread may meet the stand-in
        return _import()
    spec = find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None:
        return _import()  # which says what is wrong
    try:
        return _without_package(spec.submodule_search_locations)
    except (ImportError, AttributeError):  # another version may need its package
        return _import()


def _import() -> ModuleType:
    from llama_cpp import llama_cpp

    module: ModuleType = llama_cpp
    return module


def _without_package(folders: list[str]) -> ModuleType:
    """llama_cpp.llama_cpp out of these folders, with sys.modules as before afterwards."""
    before = set(sys.modules)
    package = ModuleType("llama_cpp")
    package.__path__ = folders
    sys.modules["llama_cpp"] = package
    try:
        return _import()
    finally:
        for name in [n for n in sys.modules.keys() - before if n.split(".")[0] == "llama_cpp"]:
            del sys.modules[name]


@cache  # llama.cpp keeps the pointer; so must we
def _log_callback(lib: Any) -> Any:
    def log(level: int, text: bytes, _: object) -> None:
        if level == _ERROR and len(_LOG) < _MOST_LINES:
            _LOG.append(text.decode(errors="replace").strip())

    return lib.llama_log_callback(log)


@cache
def _deaf(lib: Any) -> Any:
    """A log callback in C that does nothing: a function that looks at no argument and returns a constant."""
    return ctypes.cast(lib.llama_max_devices, lib.llama_log_callback)


def keep_errors(lib: Any) -> None:
    """Log to Python from now on: errors are kept for `first_error`, the rest is dropped."""
    _LOG.clear()
    lib.llama_log_set(_log_callback(lib), ctypes.c_void_p(0))


def keep_nothing(lib: Any) -> None:
    """Log nowhere from now on, without calls into Python, which would wait for the GIL."""
    lib.llama_log_set(_deaf(lib), ctypes.c_void_p(0))


def forget_errors() -> None:
    """What is logged from now on is the first."""
    _LOG.clear()


def first_error() -> str:
    """What llama.cpp first complained of since `keep_errors` or `forget_errors`, for error messages.

    The first line says why; those after it say what failed because of that.
    """
    if not _LOG:
        return "it gave no reason"
    return shown(" ".join(_LOG[0].removeprefix(_SAID_ANYWAY).split()), 300)


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
