"""Code shared by the benchmark scripts: the bench models, the head of a report, and a noise meter.

The scripts print Markdown to stdout, or JSON with --json. They expect the two models of `bench-models` in
~/.cache/emlocal-bench (or EMLOCAL_BENCH_MODELS).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

# must be set before numpy is imported; `emlocal` does the same
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

FOLDER = Path(os.environ.get("EMLOCAL_BENCH_MODELS", "~/.cache/emlocal-bench")).expanduser()
MODELS = {
    "qwen2.5-coder-0.5b": FOLDER / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "smollm2-135m": FOLDER / "smollm2-135m-instruct-q4_1.gguf",
}
QUIET = 0.05
"""Share of the processor that other processes may use during a measurement."""


def arguments(description: str, parts: Sequence[str] = (), **extra: int) -> argparse.Namespace:
    """Parses --json, --model, and the script's own parts and numbers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this model; repeatable")
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    if parts:
        parser.add_argument("--part", choices=parts, action="append", help="only this part; repeatable")
    chosen = parser.parse_args()
    if parts:
        chosen.part = chosen.part or list(parts)
    chosen.model = chosen.model or list(MODELS)
    return chosen


def circumstances() -> dict[str, Any]:
    """Returns machine, commit and versions, without which a figure means nothing."""
    from emlocal import machine

    dirty = _git("status", "--porcelain", "--untracked-files=no")
    packages = ("numpy", "llama-cpp-python", "mlx", "mlx-lm", "typer", "rich")
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": _git("rev-parse", "--short", "HEAD") + (" with changes" if dirty else ""),
        "machine": machine.describe(),
        "versions": {name: version(name) for name in packages if any(distributions(name=name))},
    }


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def report(
    results: dict[str, Any], columns: Sequence[str], rows: Sequence[Sequence[object]], as_json: bool
) -> None:
    """Prints the circumstances and the table, or everything as JSON."""
    around = circumstances()
    if as_json:
        print(json.dumps({**around, "results": results}, indent=2, default=vars))
        return
    machine = around["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in around["versions"].items())
    print(f"`{around['command']}`, commit {around['commit']}, {around['date']}  ")
    print(
        f"{machine['cpu']}, {machine['logical_cores']} vCPU, {machine['system']},"
        f" Python {machine['python']}, {versions}\n"
    )
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def say(text: str) -> None:
    """Prints progress on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def running_on(model: str) -> Iterator[Any]:
    """Opens a runner on one of the bench models."""
    from emlocal.backends.base import LoadOptions
    from emlocal.backends.llama_cpp import LlamaCppBackend
    from emlocal.generation import Scheduler
    from emlocal.models.resolve import resolve

    backend = LlamaCppBackend(resolve(str(MODELS[model])), LoadOptions(context=2048, sequences=2))
    try:
        yield Scheduler(backend, 1)
    finally:
        backend.close()


class Noise:
    """Measures how much of the processor other processes use; 0 where that cannot be known."""

    def __init__(self) -> None:
        self._before = _processor_seconds()

    def share(self) -> float:
        """Returns their share of all cores since the start, from 0 to 1.

        Our own threads' time may be counted late, which can show as slightly more than 0.
        """
        busy, own, wall = (now - then for now, then in zip(_processor_seconds(), self._before, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1))


def _processor_seconds() -> tuple[float, float, float]:
    """Returns the busy seconds of all cores, those of this process, and the clock."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    stat = Path("/proc/stat")
    if not stat.exists():
        return own, own, time.monotonic()
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own, time.monotonic()


def wait_until_quiet(seconds: float = 1800) -> None:
    """Waits until others leave the processor alone for three seconds, for at most `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        noise = Noise()
        time.sleep(3)
        if noise.share() < QUIET:
            return
    say("the machine does not get quiet; measuring anyway")
