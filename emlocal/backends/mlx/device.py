"""On which device a model runs, in which number format, and why."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from emlocal.errors import UsageError
from emlocal.models.header import ModelHeader
from emlocal.models.memory import Terms, available
from emlocal.models.safetensors import SafeTensor

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Place:
    """A device, a number format, and the reason for them in words."""

    device: mx.Device
    format: str
    """A key of DTYPES."""
    reason: str

    @property
    def on_gpu(self) -> bool:
        return bool(self.device.type == mx.gpu)

    @property
    def on_cpu(self) -> bool:
        return not self.on_gpu

    @property
    def dtype(self) -> mx.Dtype:
        return DTYPES[self.format]

    def describe(self) -> str:
        """ "cpu, float32 (MLX sees no GPU)"."""
        return f"{'gpu' if self.on_gpu else 'cpu'}, {self.format} ({self.reason})"


def choose_place(tensors: Mapping[str, SafeTensor], device: str = "auto", dtype: str = "auto") -> Place:
    """The GPU if there is one, else the CPU; on GPUs the format of the model's weights.

    On CPUs it is float32: a step of SmolLM2-135M took 81 ms, in bfloat16 124 and in float16 216.

    Raises UsageError for a device that is not there or a format without a name here.
    """
    gpu = mx.is_available(mx.gpu)
    if device not in ("auto", "cpu", "gpu"):
        raise UsageError(f"MLX knows no device {device}", "use cpu or gpu")
    if device == "gpu" and not gpu:
        raise UsageError("MLX sees no GPU here", "use the device cpu")
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"there is no format {dtype}", f"use {', '.join(DTYPES)}")
    chosen = mx.gpu if device == "gpu" or (device == "auto" and gpu) else mx.cpu
    reason = "asked for" if device != "auto" else "Apple's GPU" if gpu else "MLX sees no GPU"
    if device == "auto" and not gpu and _has_reference_blas():
        reason += "; slow without OpenBLAS: docs/backends.md#mlx"
    if dtype == "auto":
        dtype = "float32" if chosen == mx.cpu else _stored(tensors)
    return Place(mx.Device(chosen, 0), dtype, reason)


def _has_reference_blas() -> bool:
    """Whether matrices are multiplied by the BLAS of Linux's wheel, 25 times as slowly as OpenBLAS does it.

    numpy's OpenBLAS (libscipy_openblas) is in the process too, under names of its own.
    """
    try:
        return "/libopenblas" not in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        return False


def _stored(tensors: Mapping[str, SafeTensor]) -> str:
    """float16 where most floating-point weights are stored so, else bfloat16."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    return "float16" if sizes["F16"] > max(sizes["BF16"], sizes["F32"]) else "bfloat16"


def out_of_memory(error: RuntimeError) -> bool:
    """Whether MLX says so when a buffer or a GPU's command does not fit. On Linux's CPU the process ends."""
    text = str(error)
    return "malloc" in text or "Insufficient Memory" in text or "OutOfMemory" in text


def memory_terms(header: ModelHeader) -> Terms:
    """What an estimate of the memory that a model takes on the chosen device goes by.

    Packed weights stay packed; the others have the format that they are computed in.
    """
    size = _BYTES[choose_place({}).format]
    packed = header.quantization.endswith("-bit")  # MLX's own; GGUF models are unpacked
    weights = header.weights_bytes if packed else header.parameters * size
    return Terms(size, weights, available())
