"""Memory that a model needs and memory that is free: one line of warning instead of a killed process."""

import ctypes
import os
import platform
import subprocess
from bisect import bisect_right
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import NamedTuple

from emlocal.errors import ModelError
from emlocal.models.gguf.header import shown
from emlocal.models.header import ModelHeader
from emlocal.text import human_size

# bytes of one number in the KV cache
KV_TYPE_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
F16_BYTES = KV_TYPE_BYTES["f16"]
PROCESS_BYTES = 80_000_000  # Python, numpy and llama.cpp before any model: measured on Linux
DEFAULT_BATCH = 512  # tokens that llama.cpp computes at once (n_ubatch)
_NO_LIMIT = 1 << 60  # version 1 of cgroups writes a number near 2^63 for "no limit"


def estimate(
    header: ModelHeader,
    n_ctx: int,
    terms_: "Terms | None" = None,
    *,
    n_seqs: int = 1,
    n_batch: int = DEFAULT_BATCH,
) -> int:
    """Returns the bytes to run `n_seqs` sequences of `n_ctx` tokens each: weights, KV cache, compute buffers.

    The buffers are an allowance: activations of a batch in F32 (the widest layer twice, four states) and one
    row of logits per sequence. Sliding windows are not subtracted, so the estimate is rather too high than
    too low.
    """
    known = terms_ or terms(header)
    cache = kv_bytes(header, n_ctx * n_seqs, known.kv_type_bytes)
    needed = known.weights_bytes + cache + compute_bytes(header, n_seqs, n_batch) + known.process_bytes
    return needed - known.moved(n_ctx * n_seqs)


def kv_bytes(header: ModelHeader, tokens: int, kv_type_bytes: float = F16_BYTES) -> int:
    """Returns the bytes of the KV cache for this number of tokens."""
    numbers = sum(header.cached_heads) * (header.key_length + header.value_length)
    return ceil(tokens * numbers * kv_type_bytes)


def compute_bytes(header: ModelHeader, n_seqs: int = 1, n_batch: int = DEFAULT_BATCH) -> int:
    """Returns an allowance for the buffers of a computation; see `estimate`."""
    state = 2 * header.feed_forward_length + 4 * header.embedding_length
    return 4 * (n_batch * state + n_seqs * header.vocab_size)


def available() -> int:
    """Returns the bytes that a new process may use now without swapping, within its container's limits."""
    system = platform.system()
    if system == "Windows":
        return _available_windows()
    if system == "Darwin":
        return _available_macos()
    return min(_available_linux(), _cgroup_left())


class Terms(NamedTuple):
    """The numbers of a model's memory that depend on the engine."""

    kv_type_bytes: float
    """Bytes of one number in the KV cache."""
    weights_bytes: int
    free: int
    """Free bytes where the model would run."""
    process_bytes: int = PROCESS_BYTES
    """Bytes that the engine takes there before any model, unless it has taken them already."""
    moved: Callable[[int], int] = lambda tokens: 0
    """Returns the bytes that GPUs hold of the model with a cache for so many tokens."""


def terms(header: ModelHeader, kv_type_bytes: float = F16_BYTES) -> Terms:
    """Returns the terms of an engine that runs the weights unchanged, in main memory."""
    return Terms(kv_type_bytes, header.weights_bytes, available())


def check_memory(header: ModelHeader, n_ctx: int, terms_: Terms | None = None, *, n_seqs: int = 1) -> int:
    """Returns the estimate of the memory needed, in bytes.

    Raises ModelError, with both numbers and a context that fits, if less memory is free.
    """
    known = terms_ or terms(header)
    needed = estimate(header, n_ctx, known, n_seqs=n_seqs)
    if needed <= known.free:
        return needed
    steps = range(256, n_ctx, 256)
    fitting = 256 * bisect_right(steps, known.free, key=lambda n: estimate(header, n, known, n_seqs=n_seqs))
    smaller = "use a smaller model (emlocal models list)"
    fix = f"a context of {fitting} tokens fits: --context {fitting}" if fitting >= 256 else smaller
    each = f" for each of {n_seqs} sequences" if n_seqs > 1 else ""
    what = f"{shown(header.name)} with a context of {n_ctx:,}{each}"
    raise ModelError(
        f"{what} needs {human_size(needed)} of memory, but {human_size(known.free)} is free", hint=fix
    )


def _available_linux() -> int:
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ModelError(
        "cannot read the free memory: /proc/meminfo has no MemAvailable", hint="use Linux 3.14 or newer"
    )


def _cgroup_left(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Returns the bytes that the limits of this process's control groups leave; huge without limits.

    It reads control groups of version 1 and 2.
    """
    left = _NO_LIMIT
    for line in own.read_text("ascii").splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers == "memory":
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        group = top / path.lstrip("/")
        # Inside a container the path may be the host's; then the limit is at the top.
        for folder in (group, *(p for p in group.parents if p.is_relative_to(top))):
            left = min(left, _group_left(folder, *names))
    return left


def _group_left(folder: Path, limit: str, usage: str, cache: str) -> int:
    """Returns limit minus use of one control group; cached file pages do not count as used."""
    if not (folder / limit).is_file() or not (folder / usage).is_file():
        return _NO_LIMIT
    said = (folder / limit).read_text("ascii").strip()
    if said == "max" or int(said) >= _NO_LIMIT:
        return _NO_LIMIT
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
    return max(0, int(said) - int((folder / usage).read_text("ascii")) + int(statistics.get(cache, 0)))


def _available_macos() -> int:
    """Returns the bytes of free and inactive pages; macOS gives inactive ones to any process that asks."""
    output = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, check=True).stdout
    counts = dict(line.split(":") for line in output.splitlines()[1:] if ":" in line)
    names = ("Pages free", "Pages inactive", "Pages purgeable", "Pages speculative")
    pages = sum(int(counts[name].strip(" .")) for name in names if name in counts)
    return pages * os.sysconf("SC_PAGE_SIZE")


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 5),  # page file, address space
    )


def _available_windows() -> int:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        raise ModelError("cannot read the free memory: GlobalMemoryStatusEx failed")
    return int(status.available)
