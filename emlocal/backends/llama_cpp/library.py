"""Loading the shared library, its log, and the model: the parts that can go wrong before any token."""

import ctypes
import os
from collections import deque
from collections.abc import Iterable, Iterator, Set
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from emlocal.backends.base import ModelInfo
from emlocal.errors import BackendError, ModelError
from emlocal.models.gguf import GGUFHeader

_LOG: deque[str] = deque(maxlen=40)
_ERROR = 4  # GGML_LOG_LEVEL_ERROR

INSTALL = (
    "pip install 'llama-cpp-python>=0.3.36,<0.4' (it compiles, and needs a C++ compiler: `emlocal doctor`"
    " names the package for this system)"
)


@cache
def load_library() -> ModuleType:
    """The ctypes module, started, with its chatter caught. Raises BackendError where it is missing."""
    _wait_briefly()
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError, AttributeError) as why:  # the last: a symbol is missing
        raise BackendError(f"the llama.cpp engine cannot be loaded: {why}", INSTALL) from why
    lib: Any = llama_cpp
    lib.llama_log_set(_log_callback(lib), ctypes.c_void_p(0))
    lib.llama_backend_init()
    return llama_cpp


def _wait_briefly() -> None:
    """Let GNU OpenMP's threads sleep after a short wait for one another, unless the user has chosen.

    By default they spin for milliseconds at each of some hundred barriers a token. As soon as another
    process wants a core, a token can then take seconds instead of 6 ms (2 cores, SmolLM2-135M); with this,
    24 to 89 ms, and next to no cost where the cores are free (docs/performance.md).
    The library reads it when it is loaded.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"


@cache  # llama.cpp keeps the pointer; so must we
def _log_callback(lib: Any) -> Any:
    def log(level: int, text: bytes, _: object) -> None:
        if level == _ERROR:
            _LOG.append(text.decode(errors="replace").strip())

    return lib.llama_log_callback(log)


def last_error() -> str:
    """What llama.cpp last complained of, for error messages; "" if nothing."""
    return _LOG[-1] if _LOG else ""


def load_model(lib: Any, files: tuple[Path, ...]) -> Any:
    """A llama_model*. The files' headers have been checked before. Raises ModelError."""
    params = lib.llama_model_default_params()
    _LOG.clear()
    if len(files) == 1:
        model = lib.llama_model_load_from_file(os.fsencode(files[0]), params)
    else:
        paths = (ctypes.c_char_p * len(files))(*(os.fsencode(f) for f in files))
        model = lib.llama_model_load_from_splits(paths, len(files), params)
    if not model:
        raise ModelError(f"llama.cpp cannot load {files[0]}: {last_error() or 'no reason given'}")
    return model


class EndTokens(Set[int]):
    """The tokens that end a generation, by asking: to list them takes 40 ms for 151,936 tokens."""

    def __init__(self, lib: Any, vocab: Any, size: int) -> None:
        self._lib, self._vocab, self._size = lib, vocab, size
        self._known: dict[object, bool] = {}

    @classmethod
    def _from_iterable(cls, tokens: Iterable[Any]) -> Set[Any]:  # of `&` and the like
        return frozenset(tokens)

    def __contains__(self, token: object) -> bool:
        ends = self._known.get(token)
        if ends is None:
            valid = isinstance(token, int) and 0 <= token < self._size
            ends = self._known[token] = valid and bool(self._lib.llama_vocab_is_eog(self._vocab, token))
        return ends

    def __iter__(self) -> Iterator[int]:
        return (token for token in range(self._size) if token in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def control_texts(lib: Any, vocab: Any, size: int) -> tuple[str, ...]:
    """The names of control tokens, "<|im_end|>" and its kind; 50 ms for 151,936 tokens."""
    control = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
    tokens = (t for t in range(size) if lib.llama_vocab_get_attr(vocab, t) & control)
    texts = ((lib.llama_vocab_get_text(vocab, t) or b"").decode(errors="replace") for t in tokens)
    return tuple(text for text in texts if text)


def model_info(lib: Any, model: Any, name: str, header: GGUFHeader) -> ModelInfo:
    """What the model says of itself, from the loaded vocabulary and the file's header."""
    vocab = lib.llama_model_get_vocab(model)
    size = int(lib.llama_vocab_n_tokens(vocab))

    def text(token: int) -> str:
        raw = lib.llama_vocab_get_text(vocab, token) if 0 <= token < size else b""
        return (raw or b"").decode(errors="replace")

    return ModelInfo(
        name=name,
        architecture=header.architecture,
        vocabulary=size,
        trained_context=int(lib.llama_model_n_ctx_train(model)),
        end_tokens=EndTokens(lib, vocab, size),
        chat_template=header.chat_template,
        bos=text(int(lib.llama_vocab_bos(vocab))),
        eos=text(int(lib.llama_vocab_eos(vocab))),
        sampling=header.sampling,
    )
