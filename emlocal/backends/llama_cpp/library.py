"""The shared library: finding it, starting it, and what it logs."""

import ctypes
import sys
import threading
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from emlocal.backends.engine import wait_briefly
from emlocal.errors import BackendError
from emlocal.models.gguf.header import shown

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
