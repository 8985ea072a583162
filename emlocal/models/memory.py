"""How much memory a model takes, and how much there is: better one line before than a killed process after."""

import ctypes
import os
import subprocess
import sys
from math import ceil
from pathlib import Path

from emlocal.errors import ModelError
from emlocal.models.gguf_header import GGUFHeader
from emlocal.models.storage import human_size

F16_BYTES = 2.0  # of one number in the KV cache; q8_0 has 34/32, f32 4
DEFAULT_BATCH = 512  # tokens llama.cpp computes at once (n_ubatch)
_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # version 1 of cgroups writes a number near 2^63 for "no limit"


def estimate(
    header: GGUFHeader,
    n_ctx: int,
    *,
    kv_type_bytes: float = F16_BYTES,
    n_seqs: int = 1,
    n_batch: int = DEFAULT_BATCH,
) -> int:
    """Bytes to run `n_seqs` sequences of `n_ctx` tokens each: weights, KV cache, compute buffers.

    The buffers are an allowance: activations of a batch in F32 (the widest layer twice, four states) and one
    row of logits a sequence. Sliding windows are not taken off, so the estimate errs to the safe side.
    """
    return (
        header.weights_bytes
        + kv_bytes(header, n_ctx * n_seqs, kv_type_bytes)
        + _compute_bytes(header, n_seqs, n_batch)
    )


def kv_bytes(header: GGUFHeader, tokens: int, kv_type_bytes: float = F16_BYTES) -> int:
    """Bytes of the KV cache for so many tokens."""
    head_size = header.embedding_length // max(header.head_count, default=0) if any(header.head_count) else 0
    keys = header.integer("attention.key_length") or head_size
    values = header.integer("attention.value_length") or head_size
    return ceil(tokens * sum(header.head_count_kv) * (keys + values) * kv_type_bytes)


def _compute_bytes(header: GGUFHeader, n_seqs: int, n_batch: int) -> int:
    widest = max(header.per_layer("feed_forward_length"), default=0)
    return 4 * (n_batch * (2 * widest + 4 * header.embedding_length) + n_seqs * header.vocab_size)


def available() -> int:
    """Bytes a new process may use now without swapping; what the system's containers allow is counted in."""
    if sys.platform == "win32":
        return _available_windows()
    if sys.platform == "darwin":
        return _available_macos()
    return min(_available_linux(), _cgroup_left())


def check_memory(header: GGUFHeader, n_ctx: int, *, kv_type_bytes: float = F16_BYTES, n_seqs: int = 1) -> int:
    """The estimate; raises ModelError, with both numbers and what would fit, if there is not so much memory."""
    needed, free = estimate(header, n_ctx, kv_type_bytes=kv_type_bytes, n_seqs=n_seqs), available()
    if needed <= free:
        return needed
    fixed = header.weights_bytes + _compute_bytes(header, n_seqs, DEFAULT_BATCH)
    per_token = kv_bytes(header, n_seqs, kv_type_bytes)
    fitting = (free - fixed) // per_token // 256 * 256 if per_token else 0
    mend = (
        f"a context of {fitting} tokens fits: --ctx {fitting}"
        if fitting >= 256
        else "use a smaller model: emlocal models list"
    )
    raise ModelError(
        f"{header.name} with {n_ctx:,} tokens of context needs about {human_size(needed)}, {human_size(free)} are free",
        hint=mend,
    )


def _available_linux() -> int:
    for line in Path("/proc/meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ModelError(
        "cannot tell the free memory: /proc/meminfo has no MemAvailable", hint="use Linux 3.14 or newer"
    )


def _cgroup_left() -> int:
    """What the container's limit leaves, version 2 or 1 of cgroups; a huge number where there is no limit."""
    for limit, usage in (
        (_CGROUP / "memory.max", _CGROUP / "memory.current"),
        (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
    ):
        if limit.is_file() and usage.is_file():
            said = limit.read_text("ascii").strip()
            return _NO_LIMIT if said == "max" else max(0, int(said) - int(usage.read_text("ascii")))
    return _NO_LIMIT


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
        *(
            (name, ctypes.c_uint64)
            for name in (
                "total",
                "available",
                "page_total",
                "page_available",
                "virtual",
                "virtual_available",
                "extended",
            )
        ),
    )


def _available_windows() -> int:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        raise ModelError("cannot tell the free memory: GlobalMemoryStatusEx failed")
    return int(status.available)
