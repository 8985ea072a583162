"""10,000 broken models: each is refused in one line, or accepted and then does not crash llama.cpp."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from emlocal.errors import ModelError
from emlocal.models.gguf import read_header
from tests.models.gguf.mutants import mutant
from tests.tiny_architectures import ARCHITECTURES, write_tiny_architecture
from tests.tiny_gguf import write_tiny_gguf

MUTANTS = 10_000
LOADED = 1_500  # of the accepted ones, with the real library
LOAD_SECONDS = 20.0  # a file that takes longer hangs llama.cpp, which is as bad as a crash


def accepted(path: Path) -> bool:
    """Whether the reader takes the file. Anything but a ModelError of one clean line fails the test."""
    try:
        read_header(path)
    except ModelError as error:
        refusal = error.message
    else:
        return True
    assert refusal.isprintable()
    return False


def test_no_mutant_brings_the_reader_down(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "mutant.gguf"
    outcomes: Counter[bool] = Counter()
    slowest, start = 0.0, time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(MUTANTS):
        path.write_bytes(mutant(seed))
        began = time.perf_counter()
        outcomes[accepted(path)] += 1
        slowest = max(slowest, time.perf_counter() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB on Linux
    print(f"{outcomes[True]} accepted, {outcomes[False]} refused in {time.perf_counter() - start:.1f} s")
    assert outcomes[False] > MUTANTS // 4, "the mutations are too tame"
    assert outcomes[True] > MUTANTS // 20, "nothing is left for the real library"
    assert slowest < 1.0
    assert grown < 100_000


class Worker:
    """llama.cpp in a process of its own, started again when a file kills it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def load(self, path: Path) -> str:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.models.gguf.llama_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # else an abort starts gdb
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        too_long = threading.Timer(LOAD_SECONDS, self.process.kill)
        too_long.start()
        verdict = self.process.stdout.readline().strip()
        too_long.cancel()
        if not verdict:
            verdict = f"killed the process, code {self.process.wait()}"
            self.process = None
        return verdict

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.mark.real
def test_the_tiny_models_decode(worker: Worker, tmp_path: Path) -> None:
    paths = [write_tiny_architecture(tmp_path / f"{name}.gguf", name) for name in ARCHITECTURES]
    for path in [write_tiny_gguf(tmp_path / "tiny.gguf"), *paths]:
        assert accepted(path)
        assert worker.load(path).startswith("decoded")
    worker.close()


@pytest.mark.real
def test_what_is_accepted_does_not_crash_llama_cpp(worker: Worker, tmp_path: Path) -> None:
    path, verdicts, crashes, loaded = tmp_path / "mutant.gguf", Counter[str](), [], 0
    for seed in range(MUTANTS):
        path.write_bytes(mutant(seed))
        if not accepted(path):
            continue
        verdict = worker.load(path)
        verdicts[verdict.split()[0]] += 1
        if verdict.startswith("killed"):
            crashes.append((seed, verdict))
        loaded += 1
        if loaded == LOADED:
            break
    worker.close()
    print(dict(verdicts))
    assert not crashes
    assert verdicts["decoded"] > loaded // 10
