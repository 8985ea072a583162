"""A model in transformers: on which device, in which number format and why; its folder loaded; LoRA on it.

Loaded are safetensors only, no code from the folder, nothing from the network, and without chatter. LoRA
layers are attached, switched off for a while, and taken out again.

For decoding on CPUs, linear layers have their weights in the order in which oneDNN's kernels read them. torch
keeps a matrix row by row, and oneDNN puts it in order anew at each product, which costs more than the product
itself where there are few rows (docs/decisions.md). Inductor's frozen graphs do the same, by the same
operators.
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
    # packed, an output layer has its own weights even where it shares the embedding's (`PackedLinear`)
    head = header.vocab_size * header.embedding_length if can_pack(place.device, place.dtype) else 0
    return Terms(size, (header.parameters + head) * size, free, RUNTIME_BYTES)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The causal language model in `folder`, ready to be run.

    Raises ModelError for a folder that is no such model, is incomplete, or has layers other than
    full or sliding attention.
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
                f"{folder} needs {size:.1f} GB; {device} has less free", "use a smaller model"
            ) from None
    loaded: nn.Module = model
    return loaded


def skeleton(folder: Path) -> nn.Module:
    """The model in `folder` without its weights (on torch's meta device): its layers, in milliseconds.

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
    """Raise ModelError for a configuration (config.json) that is no decoder of attention layers alone."""
    name = config.get("model_type") or "?"
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} is an encoder and a decoder; the torch engine runs decoders only")
    if config.get("vision_config") or config.get("audio_config"):
        raise ModelError(f"{name} also takes pictures or sound; the torch engine runs text models only")
    attention_windows(config)


def trained_context(config: Mapping[str, Any]) -> int:
    """The tokens that the model was trained for; without stretching of positions that changes with length.

    Raises ModelError where the configuration does not tell.
    """
    length = config.get("max_position_embeddings")
    if not isinstance(length, int) or length < 1:
        raise ModelError(f"{config.get('model_type')}'s config.json has no max_position_embeddings")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        # these choose the frequencies by the longest row: rows of a batch would depend on each other
        original = rope.get("original_max_position_embeddings") or config.get(
            "original_max_position_embeddings"
        )
        length = min(length, original or length)
    return length


@contextmanager
def quiet() -> Iterator[None]:
    """Within this block transformers shows no bars and no warnings; what it was set to comes back."""
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
"""That the order is chosen for. From 1 to 512 it made no difference."""


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
    """Whether linear layers of that format are quicker when packed, and can be."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.inference_mode()
def pack(model: nn.Module) -> None:
    """Put packed layers in place of the model's linear ones, those below LoRA layers too.

    For models that will not be trained. One layer at a time is there twice; an output layer whose weights are
    the embedding's stays so.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:  # another kind may do more than the product
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, PackedLinear(layer))


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the packed layers, which are no parameters of the model."""
    return sum(layer.nbytes for layer in model.modules() if isinstance(layer, PackedLinear))


class LoraLinear(nn.Module):
    """A frozen linear layer and a trainable low-rank change beside it: y = W x + b + scale · B (A x).

    A and B are float32 where they are trained, so that small optimizer steps are not rounded away, and of the
    layer's format where they are only used: casting them at each call would take longer than the products.
    Source: Hu et al. 2021, eq. 3.
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
        """A copy of the weights."""
        return LoraPair(_copy(self.a), _copy(self.b), self.scale)


def _copy(parameter: nn.Parameter) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return parameter.detach().to("cpu", torch.float32).numpy().copy()


def attach(model: nn.Module, adapter: Adapter, dtype: torch.dtype = torch.float32) -> None:
    """Put an adapter's layers into the model, in place; over those of another adapter, where there are any.

    `dtype`: of A and B; the model's own where they are not trained.

    Raises ModelError where it names a layer that the model does not have or that has another shape.
    """
    for name, pair in adapter.pairs.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            raise ModelError(f"the adapter changes {name}, which the model does not have") from None
        if not isinstance(layer, nn.Linear | LoraLinear):
            raise ModelError(f"the adapter changes {name}, which is no linear layer of the model")
        if (layer.out_features, layer.in_features) != (pair.b.shape[0], pair.a.shape[1]):
            raise ModelError(
                f"the adapter's {name} is {pair.b.shape[0]} × {pair.a.shape[1]},"
                f" the model's {layer.out_features} × {layer.in_features}",
                "give the model that this adapter was trained on",
            )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoraLinear(layer, pair, dtype))


def lora_layers(model: nn.Module) -> Mapping[str, LoraLinear]:
    """The model's LoRA layers by name, in the model's order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Within this block the model computes as if it had no adapter."""
    layers = list(lora_layers(model).values())
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear layer but the head by its name, in the model's order."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name != "lm_head"
    }
