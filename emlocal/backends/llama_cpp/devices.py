"""The GPUs that this build of llama.cpp can use, and the layers of a model that go to them."""

import ctypes
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from emlocal.backends.engine import KVType, OffloadOptions
from emlocal.errors import BackendError, UsageError
from emlocal.models.gguf.header import GGUFHeader
from emlocal.models.memory import KV_TYPE_BYTES, compute_bytes
from emlocal.models.offload import SPARE_BYTES, Offload, Sizes, divided, placed, plan, sizes_of
from emlocal.text import counted, human_size

_KINDS: dict[int, Literal["gpu", "integrated"]] = {1: "gpu", 2: "integrated"}  # ggml_backend_dev_type
_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}  # enum llama_split_mode
_POOLED = ("row", "tensor")
"""Split modes that divide each layer among all GPUs."""
_FILES = ("cuda", "metal", "vulkan", "hip", "sycl", "rpc", "musa", "cann", "opencl")
"""Parts of llama.cpp that compute elsewhere, as their shared libraries are named."""


@dataclass(frozen=True)
class GPU:
    """A GPU as llama.cpp sees it; memory in bytes."""

    name: str
    """Its name in llama.cpp, such as CUDA0."""
    description: str
    free: int
    total: int
    kind: Literal["gpu", "integrated"] = "gpu"

    @property
    def shared(self) -> bool:
        """Whether its memory is the machine's."""
        return self.kind == "integrated" or sys.platform == "darwin"


def gpus(lib: Any) -> tuple[GPU, ...]:
    """Returns the GPUs that llama.cpp uses, in its order; integrated ones only if there are no others."""
    if not lib.llama_supports_gpu_offload():
        return ()
    found = [gpu for gpu in devices(lib) if isinstance(gpu, GPU)]
    return tuple([g for g in found if g.kind == "gpu"] or found)


def devices(lib: Any) -> Iterator[GPU | str]:
    """Yields all devices that llama.cpp computes on: GPUs, and the names of others."""
    count = _function(lib, "ggml_backend_dev_count", ctypes.c_size_t)
    get = _function(lib, "ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    kind = _function(lib, "ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    name = _function(lib, "ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    description = _function(lib, "ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
    size = ctypes.POINTER(ctypes.c_size_t)
    memory = _function(lib, "ggml_backend_dev_memory", None, ctypes.c_void_p, size, size)
    for index in range(count()):
        device = get(index)
        called = name(device).decode(errors="replace")
        if kind(device) not in _KINDS:
            yield called
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        about = description(device).decode(errors="replace")
        yield GPU(called, about, free.value, total.value, _KINDS[kind(device)])


def _function(lib: Any, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """Returns a function of ggml. On Windows it is in a library of its own, loaded already."""
    libraries = [lib._lib]
    if sys.platform == "win32":
        libraries += [ctypes.CDLL("ggml"), ctypes.CDLL("ggml-base")]
    for library in libraries:
        try:
            address = ctypes.cast(library[name], ctypes.c_void_p).value
        except AttributeError:
            continue
        return ctypes.CFUNCTYPE(result, *arguments)(address or 0)
    raise BackendError(f"this build of llama.cpp has no {name}", "reinstall llama-cpp-python")


def built_for() -> tuple[str, ...]:
    """Returns what the installed llama-cpp-python computes on besides CPUs, by its files; loads nothing."""
    spec = find_spec("llama_cpp")
    folders = spec.submodule_search_locations if spec else None
    names = [path.name for folder in folders or () for path in (Path(folder) / "lib").glob("*ggml-*")]
    return tuple(part for part in _FILES if any(f"ggml-{part}" in name for name in names))


def gpus_here() -> tuple[GPU, ...]:
    """Returns the GPUs that llama-cpp-python can use here. A build for CPUs is not loaded."""
    if not built_for():
        return ()
    from emlocal.backends.llama_cpp.loading import load_library

    return gpus(load_library())


def listing() -> str:
    """Returns, as JSON, what this build computes on and the GPUs that it finds."""
    from emlocal.backends.llama_cpp.loading import load_library

    return json.dumps({"built_for": built_for(), "gpus": [asdict(gpu) for gpu in gpus(load_library())]})


class Placement(NamedTuple):
    """Which layers of a model go to which GPUs."""

    used: tuple[GPU, ...]
    offload: Offload
    of: int
    """All layers, with the output as one."""
    fits: int
    """The most layers that fit."""

    @property
    def moved(self) -> int:
        """Bytes that are not in main memory."""
        pairs = zip(self.used, self.offload.held, strict=True)
        return sum(held for gpu, held in pairs if not gpu.shared)

    def describe(self) -> str:
        """Returns "25 of 33 layers on CUDA0"; "" without a GPU."""
        if not self.used:
            return ""
        pairs = zip(self.used, self.offload.counts, strict=True)
        names = [gpu.name for gpu, count in pairs if count] or [gpu.name for gpu in self.used]
        return f"{self.offload.layers} of {counted(self.of, 'layer')} on {' and '.join(names)}"


def place(
    header: GGUFHeader, asked: OffloadOptions, found: Sequence[GPU], tokens: int, kv_type: KVType
) -> Placement:
    """Returns the placement of a model whose cache holds `tokens` tokens.

    `found`: the GPUs of this machine, in llama.cpp's order. Raises UsageError for a GPU that does not exist.
    """
    used = _used(asked, found)
    sizes = sizes_of(header, list(header.tensors.items()), tokens, KV_TYPE_BYTES[kv_type])
    every = len(sizes.layers)
    if not used:
        return Placement((), Offload((), ()), every, 0)
    reserve = SPARE_BYTES + compute_bytes(header)
    free = [max(0, gpu.free - reserve) for gpu in used]
    if asked.split_mode in _POOLED:
        whole = plan(sizes, [sum(free)])
        most = _pooled(sizes, whole.layers, free)
    else:
        most = plan(sizes, free, asked.tensor_split)
    if asked.layers == "auto":
        return Placement(used, most, every, most.layers)
    count = every if asked.layers == "all" else min(int(asked.layers), every)
    if count <= most.layers and not asked.tensor_split and asked.split_mode not in _POOLED:
        return Placement(used, plan(_last(sizes, count), free), every, most.layers)
    if asked.split_mode in _POOLED:
        return Placement(used, _pooled(sizes, count, free), every, most.layers)
    shares = asked.tensor_split or [float(f) for f in free]
    if not any(shares):
        shares = [1.0] * len(used)
    return Placement(used, divided(sizes, count, shares), every, most.layers)


def _used(asked: OffloadOptions, found: Sequence[GPU]) -> tuple[GPU, ...]:
    if not found:
        return ()
    if asked.main_gpu is not None and asked.main_gpu >= len(found):
        raise UsageError(
            f"--main-gpu is {asked.main_gpu}; it must be between 0 and {len(found) - 1} here",
            "emlocal doctor lists the GPUs",
        )
    if len(asked.tensor_split) > len(found):
        raise UsageError(
            f"--tensor-split has {len(asked.tensor_split)} shares, but llama.cpp sees"
            f" {counted(len(found), 'GPU')}",
            "emlocal doctor lists the GPUs",
        )
    if asked.split_mode == "none":
        return (found[asked.main_gpu or 0],)
    return tuple(found)


def _last(sizes: Sizes, count: int) -> Sizes:
    first = len(sizes.layers) - count
    return Sizes(sizes.layers[first:], sizes.cache[first:])


def _pooled(sizes: Sizes, count: int, free: Sequence[int]) -> Offload:
    """Returns layers that are divided among GPUs in proportion to their free memory."""
    whole, total = placed(sizes, (count,)), sum(free)
    held = tuple(whole.held[0] * f // total if total else 0 for f in free)
    return Offload((count, *[0] * (len(free) - 1)), held)


def fill(lib: Any, params: Any, asked: OffloadOptions, placement: Placement, found: Sequence[GPU]) -> Any:
    """Sets the fields of llama_model_params for a placement.

    Returns an array that must live as long as the parameters.
    """
    params.n_gpu_layers = placement.offload.layers
    if not placement.used:
        return None
    if asked.split_mode is not None:
        params.split_mode = _MODES[asked.split_mode]
    if asked.main_gpu is not None:
        params.main_gpu = asked.main_gpu
    shares: Sequence[float] = asked.tensor_split
    if not shares and len(placement.used) == len(found) > 1 and asked.split_mode not in _POOLED:
        shares = placement.offload.counts  # so that llama.cpp divides the layers as planned
    if not any(shares):
        return None
    array = (ctypes.c_float * lib.llama_max_devices())(*shares)
    params.tensor_split = array
    return array


def remarks(asked: OffloadOptions, placement: Placement) -> Iterator[str]:
    """Yields what a person should know who asked for layers on GPUs."""
    if not asked.given or asked.layers == "0":
        return
    if not placement.used:
        yield (
            "no layers go to a GPU, because this llama-cpp-python finds none;"
            " `emlocal doctor` names the wheels for GPUs"
        )
    elif placement.offload.layers > placement.fits:
        free = human_size(sum(gpu.free for gpu in placement.used))
        yield (
            f"--gpu-layers {asked.layers} may be too many: about {placement.fits} of"
            f" {counted(placement.of, 'layer')} fit into {free} of free GPU memory; try --gpu-layers auto"
        )
