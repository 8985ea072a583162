"""Models of architectures whose keys emlocal does not know: loaded in a process of their own first, once.

llama.cpp ends the process on files that contradict themselves in ways that a header's check has to know by
name (models/gguf/keys.py). Of the other architectures a crash or an endless loop happens here, in a child
with limits, and is one line. What came through is remembered by its contents.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from emlocal.errors import BackendError, ModelError
from emlocal.models.gguf.header import shown
from emlocal.models.gguf.keys import CHECKED
from emlocal.models.gguf.known import came_through, remember_trial
from emlocal.models.resolve import GGUFModel

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
    """The child: load the files, compute four tokens, and end with exit code 0 if nothing crashed."""
    settings = json.loads(arguments[0])
    _limit(settings["seconds"], settings["bytes"])
    from emlocal.backends.llama_cpp.loading import keep_nothing, load_library, load_model

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
        import ctypes

        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, ctypes.c_ulong(signal.SIGKILL), *[ctypes.c_ulong(0)] * 3)
