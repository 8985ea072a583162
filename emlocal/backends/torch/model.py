"""A model in transformers: its device and number format, the loading of its folder, and LoRA layers on it.

Only safetensors are loaded, no code from the folder, nothing from the network, and without messages. LoRA
layers can be attached, switched off for a while, and removed.

For decoding on CPUs, linear layers store their weights in the order in which oneDNN's kernels read them.
torch keeps a matrix row by row, and oneDNN reorders it at each product. With few rows that costs more than
the product itself (docs/decisions.md). Inductor's frozen graphs do the same, by the same operators.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from emlocal.backends.torch.cache import attention_windows
from emlocal.errors import ModelError, UsageError
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.models.header import ModelHeader
from emlocal.models.memory import Terms, available

RUNTIME_BYTES = 200_000_000
"""Bytes for transformers, the tokenizer and oneDNN's buffers, with torch loaded already.

Measured on Linux, on a CPU.
"""
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
        """Returns device, format and reason: "cpu, float32 (no CUDA device)"."""
        return f"{self.device}, {self.format} ({self.reason})"


def choose_place(device: str = "auto", dtype: str = "auto") -> Place:
    """Chooses CUDA if there is a device, else the CPU; bfloat16 if the hardware computes it.

    If it does not: float16 on CUDA, float32 on CPUs (docs/decisions.md has the measurements).

    Raises UsageError for a device that does not exist or an unknown format.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        why = "no CUDA device" if device == "cpu" else ""
    else:
        why = "asked for"
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UsageError(f"torch has no device {device}", "use cpu, cuda or cuda:N") from None
    if place.type not in ("cpu", "cuda"):
        raise UsageError(f"emlocal does not run on {device}", "use cpu, cuda or cuda:N")
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if (place.index or 0) >= count:
            raise UsageError(
                f"there is no device {device}; torch finds {count}", "use another device, or cpu"
            )
        why = torch.cuda.get_device_name(place) + (f", {why}" if why else "")
    if dtype == "auto":
        chosen = _best_on_cuda(place) if place.type == "cuda" else _best_on_cpu()
    elif dtype in DTYPES:
        chosen = DTYPES[dtype]
    else:
        raise UsageError(f"there is no format {dtype}", f"use {', '.join(DTYPES)}")
    return Place(place, chosen, why)


def _best_on_cuda(device: torch.device) -> torch.dtype:
    """Returns bfloat16 from compute capability 8.0 on, otherwise float16: older devices emulate bfloat16."""
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _best_on_cpu() -> torch.dtype:
    """Returns bfloat16 on x86 processors with instructions for it, as far as Linux tells, otherwise float32.

    Other systems are untried.
    """
    info = Path("/proc/cpuinfo")
    flags = info.read_text("utf-8", errors="replace").split() if info.is_file() else []
    return torch.bfloat16 if "avx512_bf16" in flags else torch.float32


def out_of_memory(error: BaseException) -> bool:
    """Returns whether the error means that memory ran out; on CPUs torch has no class for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def memory_terms(header: ModelHeader) -> Terms:
    """Returns the terms for an estimate of a model's memory on the chosen device."""
    place = choose_place()
    size = place.dtype.itemsize
    free = torch.cuda.mem_get_info(place.device)[0] if place.device.type == "cuda" else available()
    # a packed output layer has its own weights even if it shares the embedding's (`PackedLinear`)
    head = header.vocab_size * header.embedding_length if can_pack(place.device, place.dtype) else 0
    return Terms(size, (header.parameters + head) * size, free, RUNTIME_BYTES)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Loads the causal language model in `folder`, ready to run.

    Raises ModelError for a folder that is not such a model, is incomplete, or has layers other than full or
    sliding attention.
    """
    with quiet():
        config = _read_config(folder)
        try:
            loader: Any = AutoModelForCausalLM
            model, loading = loader.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelError(f"{folder} cannot be loaded: {_first_line(error)}") from None
        if missing := sorted(loading["missing_keys"]):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(
                f"{folder} has no weights for {missing[0]}{more}",
                "fetch the model again; a file may be missing",
            )
        try:
            model = model.eval().requires_grad_(False).to(device)
        except torch.OutOfMemoryError:
            size = sum(p.nbytes for p in model.parameters()) / 1e9
            raise ModelError(
                f"{folder} needs {size:.1f} GB; {device} has less memory free", "use a smaller model"
            ) from None
    loaded: nn.Module = model
    return loaded


def skeleton(folder: Path) -> nn.Module:
    """Returns the model in `folder` without weights (on torch's meta device), within milliseconds.

    Raises ModelError as `load_model` does for its configuration.
    """
    with quiet(), torch.device("meta"):
        loader: Any = AutoModelForCausalLM
        model: nn.Module = loader.from_config(_read_config(folder), trust_remote_code=False)
    return model


def _read_config(folder: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} has no usable config.json: {_first_line(error)}") from None
    check_architecture(config.to_dict())
    return config


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raises ModelError unless a configuration (config.json) is a decoder of attention layers alone."""
    name = config.get("model_type") or "?"
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} has an encoder and a decoder; the torch engine runs decoders only")
    if config.get("vision_config") or config.get("audio_config"):
        raise ModelError(f"{name} also takes pictures or sound; the torch engine runs text models only")
    attention_windows(config)


def trained_context(config: Mapping[str, Any]) -> int:
    """Returns the tokens that the model was trained for, without stretching positions by length.

    Raises ModelError if the configuration does not tell.
    """
    length = config.get("max_position_embeddings")
    if not isinstance(length, int) or length < 1:
        raise ModelError(f"{config.get('model_type')}'s config.json has no max_position_embeddings")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        # these choose the frequencies by the longest row, so rows of a batch would depend on each other
        original = rope.get("original_max_position_embeddings") or config.get(
            "original_max_position_embeddings"
        )
        length = min(length, original or length)
    return length


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' bars and warnings within this block, and restores its settings afterwards."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # CRITICAL
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


_ROWS = 16
"""The number of rows that the order is chosen for. From 1 to 512 it made no difference."""


class PackedLinear(nn.Module):
    """A frozen linear layer, y = W x + b, in bfloat16. It has no gradient, and its weights cannot be read."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.nbytes = layer.weight.nbytes + (0 if layer.bias is None else layer.bias.nbytes)
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether linear layers of that format are faster when packed, and can be."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.inference_mode()
def pack(model: nn.Module) -> None:
    """Replaces the model's linear layers by packed ones, also those below LoRA layers.

    For models that will not be trained. One layer at a time exists twice. An output layer whose weights are
    the embedding's stays in memory twice.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:  # another kind may do more than the product
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(layer))


def packed_bytes(model: nn.Module) -> int:
    """Returns the bytes of the packed layers, which are not parameters of the model."""
    return sum(layer.nbytes for layer in model.modules() if isinstance(layer, PackedLinear))


class LoraLinear(nn.Module):
    """A frozen linear layer and a trainable low-rank change beside it: y = W x + b + scale · B (A x).

    A and B are float32 in training, so that small optimizer steps are not rounded away. Otherwise they have
    the layer's format: casting them at each call would take longer than the products. Source: Hu et al. 2021,
    eq. 3.
    """

    def __init__(self, base: "nn.Linear | LoraLinear", pair: LoraPair, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.in_features: int = base.in_features
        self.out_features: int = base.out_features
        device = next(base.parameters()).device
        self.a = nn.Parameter(torch.from_numpy(pair.a.copy()).to(device, dtype))
        self.b = nn.Parameter(torch.from_numpy(pair.b.copy()).to(device, dtype))
        self.scale = pair.scale
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        low = x @ self.a.to(x.dtype).T
        return torch.add(y, low @ self.b.to(x.dtype).T, alpha=self.scale)

    def pair(self) -> LoraPair:
        """Returns a copy of the weights."""
        return LoraPair(_copy(self.a), _copy(self.b), self.scale)


def _copy(parameter: nn.Parameter) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return parameter.detach().to("cpu", torch.float32).numpy().copy()


def attach(model: nn.Module, adapter: Adapter, dtype: torch.dtype = torch.float32) -> None:
    """Puts an adapter's layers into the model, in place, on top of earlier adapters' layers.

    `dtype`: of A and B; the model's own if they are not trained.

    Raises ModelError if the adapter names a layer that the model does not have or that has another shape.
    """
    for name, pair in adapter.pairs.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise ModelError(f"the adapter changes {name}, which the model does not have") from None
        if not isinstance(layer, nn.Linear | LoraLinear):
            raise ModelError(f"the adapter changes {name}, which is not a linear layer of the model")
        if (layer.out_features, layer.in_features) != (pair.b.shape[0], pair.a.shape[1]):
            raise ModelError(
                f"the adapter's {name} is {pair.b.shape[0]} × {pair.a.shape[1]},"
                f" the model's {layer.out_features} × {layer.in_features}",
                "use the model that this adapter was trained on",
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(layer, pair, dtype))


def lora_layers(model: nn.Module) -> Mapping[str, LoraLinear]:
    """Returns the model's LoRA layers by name, in the model's order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Makes the model compute without its adapter within this block."""
    layers = list(lora_layers(model).values())
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns (out, in) of each linear layer except the head, by name, in the model's order."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    }
