"""Loads a model and its context in a thread, while Python does something else.

The module does not import numpy, which is imported during the loading. First comes the shared library:
finding it, starting it, and its log. At the end comes the trial: a model whose architecture has keys that
emlocal does not know is first loaded in a process of its own, once.

llama.cpp ends the process on files that contradict themselves, in ways that the check of the header must know
by name (models/gguf/keys.py). For other architectures, a crash or an endless loop happens in a child process
with limits, and becomes one line of error. A model that passed is remembered by its contents.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NamedTuple, Self

from emlocal.backends.engine import KVType, LoadOptions, context_length, wait_briefly
from emlocal.backends.llama_cpp.devices import Placement, fill, gpus, place, remarks
from emlocal.errors import BackendError, ModelError, UsageError
from emlocal.machine import physical_cores
from emlocal.models.gguf.file import came_through, remember_trial
from emlocal.models.gguf.header import shown
from emlocal.models.gguf.keys import CHECKED
from emlocal.models.resolve import GGUFModel

_LOG: list[str] = []
_MOST_LINES = 40
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
# stands before the reason why llama.cpp refuses a model
_SAID_ANYWAY = "llama_model_load: error loading model: "

REQUIREMENT = "llama-cpp-python>=0.3.36,<0.4"
INSTALL = (
    f"pip install '{REQUIREMENT}' (it compiles, and needs a C++ compiler: `emlocal doctor`"
    " names the package for this system)"
)


@cache
def load_library() -> ModuleType:
    """Returns the ctypes module, started. Raises BackendError if it is missing."""
    wait_briefly()
    try:
        lib: Any = _declarations()
    except (ImportError, OSError, RuntimeError, AttributeError) as why:  # AttributeError: a symbol is missing
        raise BackendError(f"the llama.cpp engine cannot be loaded: {why}", INSTALL) from why
    keep_errors(lib)
    lib.llama_backend_init()
    return lib  # type: ignore[no-any-return]


def _declarations() -> ModuleType:
    """Returns llama_cpp.llama_cpp, the C functions, without the package around it.

    The package would import its Llama class, chat formats and everything that they need: 25 ms. So an empty
    module replaces it while its part is imported. A later import of llama_cpp gets the whole package, with
    declarations of its own for the same library.
    """
    if "llama_cpp" in sys.modules or threading.active_count() > 1:  # another thread must not see the stand-in
        return _import()
    spec = find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None:
        return _import()  # this import reports what is wrong
    try:
        return _without_package(spec.submodule_search_locations)
    except (ImportError, AttributeError):  # another version may need its package
        return _import()


def _import() -> ModuleType:
    from llama_cpp import llama_cpp

    module: ModuleType = llama_cpp
    return module


def _without_package(folders: list[str]) -> ModuleType:
    """Returns llama_cpp.llama_cpp from these folders, and leaves sys.modules as before."""
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
    """Returns a log callback in C that does nothing: it reads no argument and returns a constant."""
    return ctypes.cast(lib.llama_max_devices, lib.llama_log_callback)


def keep_errors(lib: Any) -> None:
    """Sends the log to Python from now on: errors are kept for `first_error`, the rest is dropped."""
    _LOG.clear()
    lib.llama_log_set(_log_callback(lib), ctypes.c_void_p(0))


def keep_nothing(lib: Any) -> None:
    """Sends the log nowhere from now on, without calls into Python, which would wait for the GIL."""
    lib.llama_log_set(_deaf(lib), ctypes.c_void_p(0))


def forget_errors() -> None:
    """Drops the errors so far; the next error is the first."""
    _LOG.clear()


def first_error() -> str:
    """Returns llama.cpp's first error since `keep_errors` or `forget_errors`, for error messages.

    The first line gives the reason; later lines say what failed because of it.
    """
    if not _LOG:
        return "it gave no reason"
    return shown(" ".join(_LOG[0].removeprefix(_SAID_ANYWAY).split()), 300)


BATCH = 512  # tokens per llama_decode, at most
DEFAULT_KV_TYPE: KVType = "f16"
_KV_TYPES: dict[KVType, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}  # enum ggml_type


class Loaded(NamedTuple):
    """The model and context that llama.cpp made; the receiver must free both pointers."""

    model: Any
    context: Any


class Loading:
    """A loading in progress. It begins on construction; `wait` returns the result.

    If the model needs a trial in a child process, that comes first (`try_first`).

    If an exception leaves its `with` block, the loaded parts are freed. The thread runs no Python code
    between its two calls of llama.cpp, so that it does not wait for the GIL. No signal is ever handled there.
    """

    def __init__(self, model: GGUFModel, options: LoadOptions) -> None:
        self.threads = options.threads or physical_cores()
        try_first(model, self.threads)
        self.lib: Any = load_library()
        self.length = context_length(options.context, model.header.context_length)
        most = self.lib.llama_max_parallel_sequences()
        if options.sequences > most:
            raise UsageError(
                f"{options.sequences} sequences at once, emlocal's own included, exceed llama.cpp's {most}",
                "set a smaller --parallel or --samples",
            )
        # With fewer tokens than sequences, in a batch or in the whole context, llama.cpp ends the process:
        # each sequence may want its row of logits.
        self.batch = min(BATCH, max(self.length, options.sequences))
        """Tokens per llama_decode."""
        self._files, self._kv_type = model.files, options.kv_type or DEFAULT_KV_TYPE
        self._model_params = self.lib.llama_model_default_params()
        self._context_params = self._params(options)
        self.placement, self._kept = self._place(model, options)
        self._model: Any = None
        self._context: Any = None
        keep_nothing(self.lib)  # the log has two thousand lines
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
        """Returns model and context. Raises ModelError or BackendError with llama.cpp's reason."""
        try:
            self._thread.join()
        except BaseException:  # Ctrl-C
            self._abandon()
            raise
        keep_errors(self.lib)
        if not self._context:  # loads once more, to get the reason
            self._load()
        if not self._model:
            fewer = "put fewer layers on GPUs: --gpu-layers 0" if self.placement.offload.layers else ""
            raise ModelError(f"llama.cpp cannot load {self._files[0]}: {first_error()}", fewer)
        if not self._context:
            self.free()
            raise BackendError(
                f"llama.cpp cannot make a context of {self.length:,} tokens with {self._kv_type} keys and"
                f" values: {first_error()}",
                "try a smaller --context" + (" or --gpu-layers" if self.placement.offload.layers else ""),
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

    def _place(self, model: GGUFModel, options: LoadOptions) -> tuple[Placement, Any]:
        """Decides which layers go to GPUs. Returns that, and memory that the parameters point to."""
        found = gpus(self.lib)
        placement = place(model.header, options.offload, found, self._context_params.n_ctx, self._kv_type)
        for text in remarks(options.offload, placement):
            options.warn(text)
        return placement, fill(self.lib, self._model_params, options.offload, placement, found)

    def _load(self) -> None:
        self._model = self._model or load_model(self.lib, self._files, self._model_params)
        if self._model:
            self._context = self.lib.llama_init_from_model(self._model, self._context_params)

    def _abandon(self) -> None:
        self._thread.join()
        keep_errors(self.lib)
        self.free()

    def free(self) -> None:
        """Frees the loaded parts."""
        if self._context:
            self.lib.llama_free(self._context)
        if self._model:
            self.lib.llama_model_free(self._model)
        self._model = self._context = None


def load_model(lib: Any, files: tuple[Path, ...], params: Any) -> Any:
    """Returns a llama_model*, null if it cannot be loaded.

    The files' headers must have been checked before.
    """
    if len(files) == 1:
        return lib.llama_model_load_from_file(os.fsencode(files[0]), params)
    paths = (ctypes.c_char_p * len(files))(*(os.fsencode(f) for f in files))
    return lib.llama_model_load_from_splits(paths, len(files), params)


SECONDS = 30.0
"""Basic time limit of a trial; each `BYTES_A_SECOND` of the file adds a second."""
BYTES_A_SECOND = 20_000_000  # the file must come from the disk
SPARE_BYTES = 4 << 30  # of memory, in addition to twice the file (llama.cpp may rearrange all weights)

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {} import main; main(sys.argv[2:])"
_TEXT = b"Hi \xf0\x9f\x98\x80"
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def try_first(model: GGUFModel, threads: int) -> None:
    """Loads the model in a child and computes four tokens, if its architecture's keys are unknown to emlocal.

    Raises ModelError if that kills the child or does not end, BackendError if the trial is not possible.
    Files that llama.cpp refuses with an error pass: it refuses them again later. Files that passed before are
    known by their contents (`emlocal.identity.gguf_digest`) and take some milliseconds.
    """
    if model.header.architecture in CHECKED:
        return
    from importlib.metadata import version

    from emlocal.identity import gguf_digest

    key = f"{gguf_digest(model.header)} {version('llama-cpp-python')}"
    if came_through(key):
        return
    _try(model, threads)
    remember_trial(key)


def _try(model: GGUFModel, threads: int) -> None:
    size = model.header.file_size
    seconds = SECONDS + size / BYTES_A_SECOND
    settings = {"threads": threads, "seconds": seconds, "bytes": 2 * size + SPARE_BYTES}
    code = _START.format(__name__)
    arguments = [json.dumps(sys.path), json.dumps(settings), *map(str, model.files)]
    # No backtrace, because llama.cpp starts a debugger for one. No GPUs, because this is about the file.
    environment = os.environ | {"GGML_NO_BACKTRACE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise _refused(model, f"did not finish within {seconds:.0f} s") from None
    except OSError as error:
        raise BackendError(f"{model.path.name} cannot be tested in a separate process: {error}") from error
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if done.returncode < 0 or (sys.platform == "win32" and done.returncode > 1):
        raise _refused(model, _ending(done.returncode, said))
    if done.returncode:
        last = shown(said[-1]) if said else f"exit code {done.returncode}"
        raise BackendError(f"{model.path.name} cannot be tested in a separate process: {last}")


def _ending(code: int, said: list[str]) -> str:
    """Returns how the child died, with the failed assertion if it named one."""
    how = signal.Signals(-code).name if -code in set(signal.Signals) else f"code {code}"
    failed = next((line for line in said if "GGML_ASSERT" in line or "GGML_ABORT" in line), "")
    return f"ended with {how}" + (f" at {shown(failed.rpartition('/')[2])}" if failed else "")


def _refused(model: GGUFModel, what: str) -> ModelError:
    return ModelError(
        f"{model.path.name} is not a usable GGUF file: in a test in a separate process, llama.cpp {what}",
        hint="fetch the file again, or use another file of this model;"
        f" emlocal has no checks of its own for the architecture {shown(model.header.architecture)}",
    )


def main(arguments: list[str]) -> None:
    """Runs a trial in the child: loads the files, computes four tokens, exits with 0 if all went well."""
    settings = json.loads(arguments[0])
    _limit(settings["seconds"], settings["bytes"])

    lib = load_library()
    keep_nothing(lib)
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0
    model = load_model(lib, tuple(map(Path, arguments[1:])), params)
    if not model:
        return
    context_params = lib.llama_context_default_params()
    context_params.n_ctx = context_params.n_batch = context_params.n_ubatch = 64
    context_params.n_seq_max, context_params.kv_unified = 2, True
    context_params.n_threads = context_params.n_threads_batch = settings["threads"]
    context = lib.llama_init_from_model(model, context_params)
    if not context:
        return
    tokens = (lib.llama_token * 64)()
    vocab = lib.llama_model_get_vocab(model)
    found = lib.llama_tokenize(vocab, _TEXT, len(_TEXT), tokens, 64, True, True)
    for length in (min(max(found, 1), 3), 1):  # several at once, and one
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, length)) == 0:
            lib.llama_get_logits_ith(context, -1)
    os._exit(0)  # freeing it all is useless here


def _limit(seconds: float, most_bytes: int) -> None:
    """Makes the process end by itself, even if llama.cpp hangs and the parent is gone."""
    if sys.platform == "win32":
        return
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(seconds) + 5)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or hard > most_bytes:
        resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, hard))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, ctypes.c_ulong(signal.SIGKILL), *[ctypes.c_ulong(0)] * 3)
