"""How much memory a model takes, and how much there is: one line before, not a killed process after."""

import ctypes
import os
import platform
import subprocess
from math import ceil
from pathlib import Path
from typing import NamedTuple

from emlocal.errors import ModelError
from emlocal.models.gguf.header import shown
from emlocal.models.header import ModelHeader
from emlocal.text import human_size

KV_TYPE_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # of one number in the KV cache
F16_BYTES = KV_TYPE_BYTES["f16"]
PROCESS_BYTES = 80_000_000  # Python, numpy and llama.cpp before any model: measured on Linux
DEFAULT_BATCH = 512  # tokens llama.cpp computes at once (n_ubatch)
_NO_LIMIT = 1 << 60  # version 1 of cgroups writes a number near 2^63 for "no limit"


def estimate(
    header: ModelHeader,
    n_ctx: int,
    terms_: "Terms | None" = None,
    *,
    n_seqs: int = 1,
    n_batch: int = DEFAULT_BATCH,
) -> int:
    """Bytes to run `n_seqs` sequences of `n_ctx` tokens each: weights, KV cache, compute buffers.

    The buffers are an allowance: activations of a batch in F32 (the widest layer twice, four states) and one
    row of logits a sequence. Sliding windows are not taken off, so the estimate errs to the safe side.
    """
    known = terms_ or terms(header)
    cache = kv_bytes(header, n_ctx * n_seqs, known.kv_type_bytes)
    return known.weights_bytes + cache + _compute_bytes(header, n_seqs, n_batch) + known.process_bytes


def kv_bytes(header: ModelHeader, tokens: int, kv_type_bytes: float = F16_BYTES) -> int:
    """Bytes of the KV cache for so many tokens."""
    numbers = sum(header.head_count_kv) * (header.key_length + header.value_length)
    return ceil(tokens * numbers * kv_type_bytes)


def _compute_bytes(header: ModelHeader, n_seqs: int, n_batch: int) -> int:
    state = 2 * header.feed_forward_length + 4 * header.embedding_length
    return 4 * (n_batch * state + n_seqs * header.vocab_size)


def available() -> int:
    """Bytes a new process may use now without swapping, within the limits of its container."""
    system = platform.system()
    if system == "Windows":
        return _available_windows()
    if system == "Darwin":
        return _available_macos()
    return min(_available_linux(), _cgroup_left())


class Terms(NamedTuple):
    """What an engine makes of a model's numbers."""

    kv_type_bytes: float
    """Of one number in the KV cache."""
    weights_bytes: int
    free: int
    """Bytes, where the model would run."""
    process_bytes: int = PROCESS_BYTES
    """What the engine takes there before any model, as far as it is not there yet."""


def terms(header: ModelHeader, kv_type_bytes: float = F16_BYTES) -> Terms:
    """Those of an engine that runs the weights as they are, in main memory."""
    return Terms(kv_type_bytes, header.weights_bytes, available())


def check_memory(header: ModelHeader, n_ctx: int, terms_: Terms | None = None, *, n_seqs: int = 1) -> int:
    """The estimate; raises ModelError, with both numbers and what would fit, if there is less memory."""
    known = terms_ or terms(header)
    needed = estimate(header, n_ctx, known, n_seqs=n_seqs)
    if needed <= known.free:
        return needed
    fixed = known.weights_bytes + known.process_bytes + _compute_bytes(header, n_seqs, DEFAULT_BATCH)
    per_token = kv_bytes(header, n_seqs, known.kv_type_bytes)
    fitting = (known.free - fixed) // per_token // 256 * 256 if per_token else 0
    smaller = "use a smaller model: emlocal models list"
    mend = f"a context of {fitting} tokens fits: --context {fitting}" if fitting >= 256 else smaller
    each = f" for each of {n_seqs} sequences" if n_seqs > 1 else ""
    what = f"{shown(header.name)} with a context of {n_ctx:,}{each}"
    raise ModelError(f"{what} needs {human_size(needed)}; {human_size(known.free)} are free", hint=mend)


def _available_linux() -> int:
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ModelError(
        "cannot tell the free memory: /proc/meminfo has no MemAvailable", hint="use Linux 3.14 or newer"
    )


def _cgroup_left(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What the limits of this process's control groups (version 1 or 2) leave; huge where there is none."""
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
    """Limit less use of one control group; cached file pages do not count as used."""
    if not (folder / limit).is_file() or not (folder / usage).is_file():
        return _NO_LIMIT
    said = (folder / limit).read_text("ascii").strip()
    if said == "max" or int(said) >= _NO_LIMIT:
        return _NO_LIMIT
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
    return max(0, int(said) - int((folder / usage).read_text("ascii")) + int(statistics.get(cache, 0)))


def _available_macos() -> int:
    """Free and inactive pages: macOS gives the latter to whoever asks."""
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
        raise ModelError("cannot tell the free memory: GlobalMemoryStatusEx failed")
    return int(status.available)
