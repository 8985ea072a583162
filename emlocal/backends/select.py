"""Which engine runs, and why."""

import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from emlocal.backends.options import LoadOptions
from emlocal.errors import UsageError
from emlocal.models.resolve import LocalModel

if TYPE_CHECKING:
    from emlocal.backends.base import Backend


def on_apple_silicon() -> bool:
    """Whether this is a Mac with an Apple processor."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def select_backend(asked: str = "auto") -> tuple[str, str]:
    """The engine to use and the reason for it.

    Raises UsageError for an engine that this version does not have.
    """
    if asked == "llama.cpp":
        return "llama.cpp", "asked for"
    if asked != "auto":
        raise UsageError(
            f"this version of emlocal has no {asked} engine yet", "use --backend llama.cpp, or leave it out"
        )
    if on_apple_silicon():
        return "llama.cpp", "the mlx engine is not in this version yet"
    return "llama.cpp", "the engine for any CPU"


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


def load_backend(
    name: str, model: LocalModel, options: LoadOptions, meanwhile: Callable[[], None] = lambda: None
) -> "Backend":
    """Load a model. `name` is what `select_backend` answered; `meanwhile` runs while the file is read."""
    if name == "llama.cpp":
        from emlocal.backends.llama_cpp.loading import Loading

        with Loading(model, options) as loading:
            from emlocal.backends.llama_cpp.backend import LlamaCppBackend

            meanwhile()
            return LlamaCppBackend(model, options, loading)
    raise UsageError(f"there is no engine called {name}")
