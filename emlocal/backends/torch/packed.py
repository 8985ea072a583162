"""Linear layers for decoding on CPUs: weights in the order in which oneDNN's kernels read them.

torch keeps a matrix row by row, and oneDNN puts it in order anew at each product, which costs more than the
product itself where there are few rows (docs/decisions.md). Inductor's frozen graphs do the same, by the
same operators.
"""

import torch
from torch import Tensor, nn

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
