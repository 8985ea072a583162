"""Measures how long a person waits for the first token, apart from the model itself.

`--help` and `--version`: wall time of the process. `generate`: from the start of the process to the first
text on stdout. Loading (llama.cpp's model and context) and prefill (the forward pass over the prompt) are
timed in a process of their own, with nothing beside them. The rest is the difference: interpreter, imports,
the file's header, template, tokenizer and first draw, apart from work that runs while the model loads.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from common import MODELS, ROOT, Noise, arguments, report, say, wait_until_quiet

# Runs `emlocal generate` and writes the time of the first text to the last line of stderr.
_FIRST = """
import os, sys, time
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
from emlocal.cli.app import run
import emlocal.console
first = []
def write(text):
    if text and not first:
        first.append(time.time())
emlocal.console.write = write
code = run(sys.argv[1:])
print(first[0], file=sys.stderr)
sys.exit(code)
"""
# Times the engine's own part by itself: everything is imported before.
_ENGINE = """
import json, os, sys, time
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
from emlocal.backends.base import Feed
from emlocal.backends.engine import context_length
from emlocal.backends.llama_cpp.backend import LlamaCppBackend
from emlocal.backends.llama_cpp.loading import load_library
from emlocal.backends.llama_cpp.loading import Loading
from emlocal.backends.engine import LoadOptions
from emlocal.generation.prompt import chat_tokens
from emlocal.models.resolve import resolve
load_library()
model = resolve(sys.argv[1])
options = LoadOptions(context_length(None, model.header.context_length), sequences=2)
began = time.perf_counter()
loading = Loading(model, options)
loading.wait()
loaded = time.perf_counter()
backend = LlamaCppBackend(model, options, loading)
feed = Feed(backend.open(), chat_tokens(backend, [{"role": "user", "content": sys.argv[2]}]))
before = time.perf_counter()
backend.forward([feed])
print(json.dumps({"load": loaded - began, "prefill": time.perf_counter() - before}))
"""


def child(*command: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Runs a process; returns its start time (wall clock) and the finished process."""
    started = time.time()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return started, done


def wall(*command: str) -> dict[str, float]:
    """Returns the seconds of a whole process."""
    started = time.perf_counter()
    child(*command)
    return {"wall": time.perf_counter() - started}


def first_token(model: str) -> dict[str, float]:
    """Returns the seconds to the first text, with load, prefill and the rest."""
    path, prompt = str(MODELS[model]), "Hello!"
    started, done = child("-c", _FIRST, "generate", "-m", path, "-q", "-s", "0", "--max-tokens", "1", prompt)
    total = float(done.stderr.splitlines()[-1]) - started
    _, alone = child("-c", _ENGINE, path, prompt)
    engine: dict[str, float] = json.loads(alone.stdout)
    return {"first token": total, **engine, "rest": total - engine["load"] - engine["prefill"]}


def repeated(measure: Callable[[], dict[str, float]], n: int) -> dict[str, list[float]]:
    """Measures each part's seconds n times, in quiet moments if possible."""
    parts: dict[str, list[float]] = {}
    for _ in range(n + 1):  # the first fills the page cache and does not count
        wait_until_quiet(6)
        for name, seconds in measure().items():
            parts.setdefault(name, []).append(seconds)
    return {name: seconds[1:] for name, seconds in parts.items()}


def main() -> None:
    chosen = arguments(__doc__ or "", n=15)
    what: dict[str, Callable[[], dict[str, float]]] = {
        "python -c pass": lambda: wall("-c", "pass"),
        "emlocal --help": lambda: wall("-m", "emlocal", "--help"),
        "emlocal --version": lambda: wall("-m", "emlocal", "--version"),
        "import numpy": lambda: wall("-c", "import numpy"),
        "import llama_cpp": lambda: wall("-c", "import llama_cpp"),
        **{f"generate, {model}": lambda model=model: first_token(model) for model in chosen.model},  # type: ignore[misc]
    }
    results: dict[str, Any] = {}
    rows = []
    for name, measure in what.items():
        noise = Noise()
        parts = repeated(measure, chosen.n)
        results[name] = parts | {"others_used": noise.share()}
        for part, seconds in parts.items():
            low, middle, high = statistics.quantiles(seconds, n=4)
            rows.append(
                (name, part, chosen.n, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{min(seconds):.3f}")
            )
            say(f"{name}, {part}: {middle:.3f} s")
    report(results, ("what", "part", "n", "median s", "quartiles", "least"), rows, chosen.json)


if __name__ == "__main__":
    main()
