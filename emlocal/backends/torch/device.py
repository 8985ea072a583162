"""On which device a model runs, in which number format, and why."""

from dataclasses import dataclass
from pathlib import Path

import torch

from emlocal.backends.torch.model import can_pack
from emlocal.errors import UsageError
from emlocal.models.header import ModelHeader
from emlocal.models.memory import Terms, available

RUNTIME_BYTES = 200_000_000
"""transformers, the tokenizer, oneDNN's buffers, with torch loaded already: measured on Linux, on a CPU."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Place:
    """A device, a number format, and the reason for them in words."""

    device: torch.device
    dtype: torch.dtype
    reason: str

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def format(self) -> str:
        """The format's name: "float32"."""
        return str(self.dtype).removeprefix("torch.")

    def describe(self) -> str:
        """ "cpu, float32 (no CUDA device)"."""
        return f"{self.device}, {self.format} ({self.reason})"


def choose_place(device: str = "auto", dtype: str = "auto") -> Place:
    """CUDA if there is a device, else the CPU; bfloat16 where the hardware computes it.

    Where it does not: float16 on CUDA, float32 on CPUs (docs/decisions.md has the measurements).

    Raises UsageError for a device that is not there or a format without a name here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        why = "no CUDA device" if device == "cpu" else ""
    else:
        why = "asked for"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UsageError(f"torch knows no device {device}", "use cpu, cuda or cuda:N") from None
    if place.type not in ("cpu", "cuda"):
        raise UsageError(f"emlocal does not run on {device}", "use cpu, cuda or cuda:N")
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if (place.index or 0) >= count:
            raise UsageError(f"there is no device {device}; torch sees {count}", "use another device, or cpu")
        why = torch.cuda.get_device_name(place) + (f", {why}" if why else "")
    if dtype == "auto":
        chosen = _best_on_cuda(place) if place.type == "cuda" else _best_on_cpu()
    elif dtype in DTYPES:
        chosen = DTYPES[dtype]
    else:
        raise UsageError(f"there is no format {dtype}", f"use {', '.join(DTYPES)}")
    return Place(place, chosen, why)


def _best_on_cuda(device: torch.device) -> torch.dtype:
    """bfloat16 from compute capability 8.0 on: before that it is emulated."""
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _best_on_cpu() -> torch.dtype:
    """bfloat16 on x86 processors with instructions for it, as far as Linux tells; elsewhere it is untried."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text("utf-8", errors="replace").split() if info.is_file() else []
    return torch.bfloat16 if "avx512_bf16" in flags else torch.float32


def out_of_memory(error: BaseException) -> bool:
    """Whether torch says with it that there is no memory: on CPUs it has no class for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def memory_terms(header: ModelHeader) -> Terms:
    """What an estimate of the memory that a model takes on the chosen device goes by."""
    place = choose_place()
    size = place.dtype.itemsize
    free = torch.cuda.mem_get_info(place.device)[0] if place.device.type == "cuda" else available()
    # packed, an output layer has its own weights even where it shares the embedding's (packed.py)
    head = header.vocab_size * header.embedding_length if can_pack(place.device, place.dtype) else 0
    return Terms(size, (header.parameters + head) * size, free, RUNTIME_BYTES)
