"""A model in mlx-lm: its device and number format, the loading of its folder, and LoRA layers on it.

Only safetensors are loaded, no code from the folder, and nothing from the network. LoRA uses mlx-lm's own
layer.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import load_model as load_with_mlx_lm

from emlocal.errors import ModelError, UsageError
from emlocal.models.adapters.adapter import Adapter, check_fits
from emlocal.models.folder import FolderHeader
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
        """Returns device, format and reason: "cpu, float32 (MLX sees no GPU)"."""
        return f"{'gpu' if self.on_gpu else 'cpu'}, {self.format} ({self.reason})"


def choose_place(tensors: Mapping[str, SafeTensor], device: str = "auto", dtype: str = "auto") -> Place:
    """Chooses the GPU if there is one, else the CPU; on GPUs the format of the model's weights.

    On CPUs the format is float32: a step of SmolLM2-135M took 81 ms, in bfloat16 124 and in float16 216.

    Raises UsageError for a device that does not exist or an unknown format.
    """
    gpu = mx.is_available(mx.gpu)
    if device not in ("auto", "cpu", "gpu"):
        raise UsageError(f"MLX has no device {device}", "use cpu or gpu")
    if device == "gpu" and not gpu:
        raise UsageError("MLX finds no GPU on this machine", "use --device cpu")
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"there is no format {dtype}", f"use {', '.join(DTYPES)}")
    chosen = mx.gpu if device == "gpu" or (device == "auto" and gpu) else mx.cpu
    reason = "asked for" if device != "auto" else "Apple's GPU" if gpu else "MLX finds no GPU"
    if device == "auto" and not gpu and _has_reference_blas():
        reason += "; slow without OpenBLAS: docs/backends.md#mlx"
    if dtype == "auto":
        dtype = "float32" if chosen == mx.cpu else _stored(tensors)
    return Place(mx.Device(chosen, 0), dtype, reason)


def _has_reference_blas() -> bool:
    """Returns whether the BLAS of Linux's wheel multiplies matrices, 25 times as slowly as OpenBLAS does.

    numpy's OpenBLAS (libscipy_openblas) is in the process too, under names of its own.
    """
    try:
        return "/libopenblas" not in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False


def _stored(tensors: Mapping[str, SafeTensor]) -> str:
    """Returns float16 if most floating-point weights are stored in it, else bfloat16."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    return "float16" if sizes["F16"] > max(sizes["BF16"], sizes["F32"]) else "bfloat16"


def out_of_memory(error: RuntimeError) -> bool:
    """Returns whether the error says that a buffer or a GPU's command does not fit.

    On Linux's CPU the process ends instead.
    """
    text = str(error)
    return "malloc" in text or "Insufficient Memory" in text or "OutOfMemory" in text


def memory_terms(header: ModelHeader) -> Terms:
    """Returns the terms for an estimate of a model's memory on the chosen device.

    Packed weights stay packed; the others have the format that they are computed in.
    """
    size = _BYTES[choose_place({}).format]
    packed = header.quantization.endswith("-bit")  # MLX's own; GGUF models are unpacked
    weights = header.weights_bytes if packed else header.parameters * size
    return Terms(size, weights, available())


def load_model(header: FolderHeader, place: Place) -> Module:
    """Loads the causal language model in a checked folder, in the place's format, ready to run.

    Quantized layers stay quantized; their scales and all other weights take the format. The device becomes
    MLX's default one.

    Raises ModelError for a model that mlx-lm does not know or whose weights do not fit its config.
    """
    check_config(header.config)
    mx.set_default_device(place.device)
    try:
        loaded: tuple[Module, Any] = load_with_mlx_lm(
            header.path, lazy=True, model_config=old_names(header.config)
        )
        model = loaded[0]
        model.set_dtype(place.dtype)
        model.eval()
        mx.eval(model.parameters())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        said = str(error).strip().splitlines()
        why = said[0] if said else type(error).__name__
        raise ModelError(
            f"{header.path} cannot be loaded with mlx-lm: {why}", "try --backend torch or llama.cpp"
        ) from None
    return model


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ModelError for a config that asks for code of its own, or for other things than text."""
    name = config.get("model_type") or "?"
    if config.get("model_file") is not None:
        raise ModelError(
            f"{name} needs code from its folder ({config['model_file']}), which emlocal never runs"
        )
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} has an encoder and a decoder; the mlx engine runs decoders only")


def old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns transformers 5's `rope_parameters` under the names that mlx-lm reads, if those are missing.

    Without this a model would run with the wrong frequencies, which would show only in its answers.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    by_kind = {kind: part for kind, part in rope.items() if isinstance(part, dict)}
    main = by_kind.get("full_attention", rope)
    found: dict[str, Any] = {}
    if isinstance(main.get("rope_theta"), int | float):
        found["rope_theta"] = main["rope_theta"]
    if main.get("rope_type", "default") != "default":
        found["rope_scaling"] = main
    local = by_kind.get("sliding_attention", {}).get("rope_theta")
    if isinstance(local, int | float):
        found["rope_local_base_freq"] = local
    return {name: value for name, value in found.items() if config.get(name) is None}


def windows(model: Module) -> list[int | None]:
    """Returns how far back each of the model's caches reaches; None: to the beginning.

    Raises ModelError for a model that keeps anything but keys and values of attention.
    """
    untyped: Any = model
    new_cache: Any = KVCache
    caches: list[Any] = (
        untyped.make_cache() if "make_cache" in dir(type(model)) else [new_cache() for _ in untyped.layers]
    )
    found: list[int | None] = []
    for cache in caches:
        if type(cache) is KVCache:
            found.append(None)
        elif type(cache) is RotatingKVCache and cache.keep == 0:
            found.append(int(cache.max_size))
        else:
            raise ModelError(
                f"{type(model).__module__.rpartition('.')[2]} keeps a {type(cache).__name__}; the mlx engine"
                " runs models of full and sliding attention only",
                "use --backend llama.cpp with a GGUF file of this model",
            )
    return found


def context_of(header: FolderHeader, reach: list[int | None]) -> int:
    """Returns the tokens that the model was trained for, as far as mlx-lm computes it correctly.

    mlx-lm ignores the sliding window of some architectures (Mistral's first model); up to the window's length
    that makes no difference.
    """
    config, length = header.config, header.context_length
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) == "dynamic":  # mlx-lm does not stretch these
        length = min(length, rope.get("original_max_position_embeddings") or length)
    window = config.get("sliding_window")
    kinds = config.get("layer_types") or ["sliding_attention"]
    slides = window and config.get("use_sliding_window") is not False and "sliding_attention" in kinds
    if slides and isinstance(window, int) and all(size is None for size in reach):
        length = min(length, window)
    return length


def attach(model: Module, adapter: Adapter, strength: float, dtype: mx.Dtype, base: str) -> None:
    """Puts an adapter's layers into the model, in place, on top of earlier adapters' layers.

    mlx-lm's layer computes y = W x + scale · (x A) B, with A [in, rank] and B [rank, out]: `LoraPair`'s scale
    is that scale. A and B take the model's number format.

    Args:
        strength: a factor on each pair's scale.
        base: what to call the model.
    Raises ModelError if the adapter names a layer that the model does not have or that has another shape.
    """
    layers = _linear_layers(model)
    check_fits(adapter, {name: _shape(layer) for name, layer in layers.items()}, base)
    for name, pair in adapter.pairs.items():
        layer = LoRALinear(pair.a.shape[1], pair.b.shape[0], r=pair.rank, scale=pair.scale * strength)
        layer.linear = layers[name]
        layer.lora_a = mx.array(pair.a.T).astype(dtype)
        layer.lora_b = mx.array(pair.b.T).astype(dtype)
        _replace(model, name, layer)
    model.eval()
    mx.eval(model.parameters())


def linear_layers(model: Module) -> dict[str, tuple[int, int]]:
    """Returns (out, in) of each linear layer except the head, by name."""
    return {name: _shape(layer) for name, layer in _linear_layers(model).items() if name != "lm_head"}


def lora_layers(model: Module) -> dict[str, LoRALinear]:
    """Returns the model's LoRA layers by name."""
    return {name: layer for name, layer in _modules(model) if isinstance(layer, LoRALinear)}


@contextmanager
def base_weights(model: Module) -> Iterator[None]:
    """Makes the model compute without its adapter within this block.

    Arrays must be computed before the block ends.
    """
    layers = lora_layers(model)
    for name, layer in layers.items():
        _replace(model, name, layer.linear)
    try:
        yield
    finally:
        for name, layer in layers.items():
            _replace(model, name, layer)


def _modules(model: Module) -> list[tuple[str, Module]]:
    """Returns all modules by name, in the model's order, which MLX gives backwards."""
    return list(reversed(model.named_modules()))


def _linear_layers(model: Module) -> dict[str, Module]:
    kinds = Linear | QuantizedLinear | LoRALinear
    return {name: layer for name, layer in _modules(model) if isinstance(layer, kinds)}


def _shape(layer: Module) -> tuple[int, int]:
    """Returns [out, in] of a linear layer, quantized or not, or with LoRA."""
    if isinstance(layer, LoRALinear):
        return int(layer.lora_b.shape[1]), int(layer.lora_a.shape[0])
    rows, columns = layer.weight.shape
    if isinstance(layer, QuantizedLinear):
        columns = columns * 32 // layer.bits
    return int(rows), int(columns)


def _replace(model: Module, name: str, layer: Module) -> None:
    """Puts `layer` at the place `name`, such as "model.layers.0.self_attn.q_proj"."""
    *path, last = name.split(".")
    parent = model
    for part in path:
        parent = parent[int(part)] if part.isdigit() else parent[part]
    parent[last] = layer
