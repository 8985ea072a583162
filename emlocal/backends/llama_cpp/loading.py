"""A model and its context on their way into memory, while Python does something else.

No numpy here: it is among what is imported meanwhile. First the shared library: finding it, starting it, and
what it logs. At the end the trial: models of architectures whose keys emlocal does not know are loaded in a
process of their own first, once.

llama.cpp ends the process on files that contradict themselves in ways that a header's check has to know by
name (models/gguf/keys.py). Of the other architectures a crash or an endless loop happens there, in a child
with limits, and is one line. What came through is remembered by its contents.
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
from emlocal.errors import BackendError, ModelError, UsageError
from emlocal.machine import physical_cores
from emlocal.models.gguf.file import came_through, remember_trial
from emlocal.models.gguf.header import shown
from emlocal.models.gguf.keys import CHECKED
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
    """Begins to load when it is made, after a trial in a child where the model needs one (`try_first`).

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


SECONDS = 30.0
"""What a trial may take, and besides: one second for each ..."""
BYTES_A_SECOND = 20_000_000  # ... of the file, which has to come from the disk
SPARE_BYTES = 4 << 30  # of memory, besides twice the file (llama.cpp may rearrange all weights)

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {} import main; main(sys.argv[2:])"
_TEXT = b"Hi \xf0\x9f\x98\x80"
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def try_first(model: GGUFModel, threads: int) -> None:
    """Load the model in a child and compute four tokens, if emlocal does not know its architecture's keys.

    Raises ModelError where that kills the child or does not end, BackendError where it cannot be done.
    What llama.cpp refuses with an error comes through here: it does so again. Files that came through before
    are known by their contents (`emlocal.identity.gguf_digest`) and cost some milliseconds.
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
    # Without a backtrace: llama.cpp starts a debugger for one. Without GPUs: this is about the file.
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
        raise BackendError(f"{model.path.name} cannot be tried in a process of its own: {error}") from error
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    if done.returncode < 0 or (sys.platform == "win32" and done.returncode > 1):
        raise _refused(model, _ending(done.returncode, said))
    if done.returncode:
        last = shown(said[-1]) if said else f"exit code {done.returncode}"
        raise BackendError(f"{model.path.name} cannot be tried in a process of its own: {last}")


def _ending(code: int, said: list[str]) -> str:
    """How the child died, with the assertion that failed if it named one."""
    how = signal.Signals(-code).name if -code in set(signal.Signals) else f"code {code}"
    failed = next((line for line in said if "GGML_ASSERT" in line or "GGML_ABORT" in line), "")
    return f"ended with {how}" + (f" at {shown(failed.rpartition('/')[2])}" if failed else "")


def _refused(model: GGUFModel, what: str) -> ModelError:
    return ModelError(
        f"{model.path.name} is not a usable GGUF file: tried in a process of its own, llama.cpp {what}",
        hint=f"get the file again, or another one of this model ({shown(model.header.architecture)} is not"
        " among the architectures whose files emlocal checks by itself)",
    )


def main(arguments: list[str]) -> None:
    """A trial's child: load the files, compute four tokens, and end with exit code 0 if nothing crashed."""
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
    os._exit(0)  # to free it all is of no use here


def _limit(seconds: float, most_bytes: int) -> None:
    """End by itself, whatever llama.cpp does and whoever started this is gone."""
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
