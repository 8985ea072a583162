"""What a person waits for before the first token, beside the model itself.

`--help` and `--version`: wall time of the process. `generate`: from the start of the process to the first
text on stdout, split into loading (llama.cpp's model and context), prefill (the forward pass over the
prompt) and the rest: the interpreter, imports, the file's header, template, tokenizer, the first draw.
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

# Runs `emlocal generate` with clocks around the engine's own work; what it finds goes to stderr's last line.
_CHILD = """
import json, os, sys, time
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
from emlocal.cli.app import run
import emlocal.console
spent, first = {"load": 0.0, "prefill": 0.0}, []
def timed(name, call):
    def wrapper(*arguments, **options):
        started = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            spent[name] += time.perf_counter() - started
    return wrapper
def watch():
    from emlocal.backends.llama_cpp import backend
    backend.load_model = timed("load", backend.load_model)
    engine = backend.LlamaCppBackend
    engine._new_context = timed("load", engine._new_context)
    engine.forward = timed("prefill", engine.forward)
def write(text):
    if text and not first:
        first.append(time.time())
import emlocal.cli.engine as opening
real = opening.load_backend
def load_backend(*arguments):
    watch()
    return real(*arguments)
opening.load_backend = load_backend
emlocal.console.write = write
code = run(sys.argv[1:])
print(json.dumps(spent | {"first": first[0]}), file=sys.stderr)
sys.exit(code)
"""


def child(*command: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """When the process started (wall clock), and how it ended."""
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
    """Seconds of a whole process."""
    started = time.perf_counter()
    child(*command)
    return {"wall": time.perf_counter() - started}


def first_token(model: str) -> dict[str, float]:
    """Seconds to the first text, by what they were spent on."""
    started, done = child(
        "-c", _CHILD, "generate", "-m", str(MODELS[model]), "-q", "-s", "0", "--max-tokens", "1", "Hello!"
    )
    found = json.loads(done.stderr.splitlines()[-1])
    total = found["first"] - started
    rest = total - found["load"] - found["prefill"]
    return {"first token": total, "load": found["load"], "prefill": found["prefill"], "rest": rest}


def repeated(measure: Callable[[], dict[str, float]], n: int) -> dict[str, list[float]]:
    """Each part's seconds, n times, in quiet moments where there are any."""
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
