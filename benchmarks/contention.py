"""Measures how a busy neighbour slows decoding, for several spin times of OpenMP's waiting threads.

Each case decodes for some seconds with SmolLM2 on all cores: alone, beside a process that computes on one
core, and beside a second decoder. emlocal sets GOMP_SPINCOUNT=1000; GNU OpenMP's default is 300000. Linux
only.
"""

import os
import subprocess
import sys
import time
from typing import Any

from common import arguments, report, running_on, say, wait_until_quiet

CHOICES = {
    "GOMP_SPINCOUNT=300000 (the default)": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=1000 (emlocal)": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
NEIGHBOURS = ("alone", "one busy core", "another decoder")


def decode_for(seconds: float) -> float:
    """Decodes for some seconds; returns the milliseconds a token."""
    from emlocal.backends.base import Feed
    from emlocal.backends.llama_cpp.backend import bare_decode

    with running_on("smollm2-135m") as running:
        backend = running.backend
        sequence = backend.open()
        backend.forward([Feed(sequence, [1, 2, 3])])
        started, tokens = time.monotonic(), 0
        while (passed := time.monotonic() - started) < seconds:
            tokens += len(bare_decode(backend, sequence, 5, 4))
        return passed / tokens * 1000


def measure(environment: dict[str, str], neighbour: str, seconds: int) -> float:
    """Returns the milliseconds a token of a decoder beside a neighbour."""
    variables = os.environ | environment
    decoder = [sys.executable, __file__, "--child", str(seconds)]
    busy = {"one busy core": [sys.executable, "-c", "while True: pass"], "another decoder": decoder}
    other = (
        subprocess.Popen(busy[neighbour], env=variables, stdout=subprocess.PIPE)
        if neighbour in busy
        else None
    )
    try:
        return float(subprocess.check_output(decoder, env=variables, text=True))
    finally:
        if other:
            other.kill()
            other.communicate()


def main() -> None:
    chosen = arguments(__doc__ or "", seconds=8, child=0)
    if chosen.child:
        print(decode_for(chosen.child))
        return
    results: dict[str, Any] = {}
    for name, environment in CHOICES.items():
        results[name] = {}
        for neighbour in NEIGHBOURS:
            wait_until_quiet(30)
            found = results[name][neighbour] = measure(environment, neighbour, chosen.seconds)
            say(f"{name}, {neighbour}: {found:.1f} ms")
    rows = [(name, *(f"{ms:.1f}" for ms in found.values())) for name, found in results.items()]
    report(results, ("ms a token", *NEIGHBOURS), rows, chosen.json)


if __name__ == "__main__":
    main()
