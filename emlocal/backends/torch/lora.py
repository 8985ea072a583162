"""LoRA layers on a transformers model: attach an adapter, switch it off for a while, take it out again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from emlocal.errors import ModelError
from emlocal.models.adapters.adapter import Adapter, LoraPair


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
