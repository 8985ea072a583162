"""LoRA on an mlx-lm model, in mlx-lm's own layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear
from mlx_lm.tuner.lora import LoRALinear

from emlocal.models.adapters.adapter import Adapter
from emlocal.models.adapters.checks import check_fits


def attach(model: Module, adapter: Adapter, strength: float, dtype: mx.Dtype, base: str) -> None:
    """Put an adapter's layers into the model, in place; over those of another adapter, where there are any.

    mlx-lm's layer computes y = W x + scale · (x A) B, with A [in, rank] and B [rank, out]: `LoraPair`'s
    scale is that scale. A and B take the model's number format.

    Args:
        strength: times each pair's scale.
        base: what to call the model.
    Raises ModelError where the adapter names a layer that the model does not have or that has another shape.
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
    """(out, in) of each linear layer but the head by its name."""
    return {name: _shape(layer) for name, layer in _linear_layers(model).items() if name != "lm_head"}


def lora_layers(model: Module) -> dict[str, LoRALinear]:
    """The model's LoRA layers by name."""
    return {name: layer for name, layer in _modules(model) if isinstance(layer, LoRALinear)}


@contextmanager
def base_weights(model: Module) -> Iterator[None]:
    """Within this block the model computes as if it had no adapter. Nothing outlives it that is not
    computed."""
    layers = lora_layers(model)
    for name, layer in layers.items():
        _replace(model, name, layer.linear)
    try:
        yield
    finally:
        for name, layer in layers.items():
            _replace(model, name, layer)


def _modules(model: Module) -> list[tuple[str, Module]]:
    """All modules by name, in the model's order, which MLX gives backwards."""
    return list(reversed(model.named_modules()))


def _linear_layers(model: Module) -> dict[str, Module]:
    kinds = Linear | QuantizedLinear | LoRALinear
    return {name: layer for name, layer in _modules(model) if isinstance(layer, kinds)}


def _shape(layer: Module) -> tuple[int, int]:
    """[out, in] of a linear layer, quantized or not, or with LoRA."""
    if isinstance(layer, LoRALinear):
        return int(layer.lora_b.shape[1]), int(layer.lora_a.shape[0])
    rows, columns = layer.weight.shape
    if isinstance(layer, QuantizedLinear):
        columns = columns * 32 // layer.bits
    return int(rows), int(columns)


def _replace(model: Module, name: str, layer: Module) -> None:
    """Put `layer` at "model.layers.0.self_attn.q_proj"."""
    *path, last = name.split(".")
    parent = model
    for part in path:
        parent = parent[int(part)] if part.isdigit() else parent[part]
    parent[last] = layer
