"""A LoRA adapter in memory, in the form that every format and engine of emlocal uses.

The module also has the checks that every adapter must pass, whatever its format, and the check whether it
fits a model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emlocal.errors import ModelError
from emlocal.models.gguf import MAX_LORA_RANK
from emlocal.models.gguf.header import shown


@dataclass(frozen=True)
class LoraPair:
    """An addition to one linear layer y = W x: scale · B (A x). Source: Hu et al. 2021, eq. 3."""

    a: NDArray[np.float32]
    """A, float32 [rank, in]."""
    b: NDArray[np.float32]
    """B, float32 [out, rank]."""
    scale: float
    """alpha / rank (rsLoRA: alpha / √rank)."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a.shape[0])


@dataclass(frozen=True)
class Adapter:
    """LoRA pairs by the name that transformers gives the layer: "model.layers.0.self_attn.q_proj".

    Rows of B are in transformers' order. For architectures whose Q and K rows GGUF permutes, readers and
    writers of GGUF permute them.
    """

    pairs: Mapping[str, LoraPair]
    base_model: str = ""
    """The base model that the adapter names; "" if it names none."""


_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_LONGEST_NAME = 200
_LARGEST_SCALE = 1e6
_LARGEST_WEIGHT = 1e9
"""The largest weight allowed. Training stays below 100, but the largest scale may be folded into a weight."""


def checked_pair(
    where: str, name: str, a: NDArray[np.float32], b: NDArray[np.float32], scale: float
) -> LoraPair:
    """Returns a checked pair, which later steps can rely on.

    A is [rank, in], B [out, rank]; `where` is the file.

    Raises ModelError if `name` is not a layer's, or if the shapes do not form a pair. It refuses a rank of 0
    or above 4,096, a scale above a million, and a weight that is infinite, above a billion, or not a number.
    """
    if len(name) > _LONGEST_NAME or not _MODULE.fullmatch(name):
        raise unusable(where, f"{shown(name)} is not the name of a layer")
    if a.ndim != 2 or b.ndim != 2:
        raise unusable(where, f"A and B of {name} are {dims(a.shape)} and {dims(b.shape)}, not matrices")
    if a.shape[0] != b.shape[1]:
        raise unusable(where, f"A of {name} has rank {a.shape[0]:,}, B {b.shape[1]:,}")
    if not 1 <= a.shape[0] <= MAX_LORA_RANK or not a.size or not b.size:
        raise unusable(
            where,
            f"A of {name} is {dims(a.shape)} and B {dims(b.shape)}; ranks are from 1 to {MAX_LORA_RANK:,}",
        )
    if not abs(scale) <= _LARGEST_SCALE:  # false for NaN, too
        raise unusable(where, f"the scale of {name} is {scale:g}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise unusable(where, f"{name} has weights that are infinite or not a number")
    largest = max(float(np.abs(a).max()), float(np.abs(b).max()))
    if largest > _LARGEST_WEIGHT:
        raise unusable(where, f"{name} has a weight of {largest:.2g}")
    return LoraPair(a, b, float(scale))


def folded(name: str, pair: LoraPair, scale: float) -> NDArray[np.float32]:
    """Returns B for a file with the scale `scale` (not 0), if this layer's own differs. Raises ModelError."""
    if pair.scale == scale:
        return pair.b
    with np.errstate(over="ignore"):
        b = (pair.b.astype(np.float64) * (pair.scale / scale)).astype(np.float32)
    if not np.isfinite(b).all():
        raise ModelError(
            f"the scale of {name}, {pair.scale:g}, differs from the others', {scale:g}",
            "write the adapter as a PEFT folder",
        )
    return b


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], base: str) -> None:
    """Compares an adapter with the linear layers of a model, [out, in] by name; `base` is the model's name.

    Raises ModelError if the adapter names a layer that does not exist or has another shape.
    """
    for name, pair in adapter.pairs.items():
        found = (pair.b.shape[0], pair.a.shape[1])
        there = shapes.get(name)
        if there is None:
            tied = " (it has no output matrix of its own)" if name == "lm_head" else ""
            raise ModelError(f"the adapter changes {name}, which {base} does not have{tied}", _OTHER_MODEL)
        if there != found:
            raise ModelError(
                f"the adapter does not fit {base}: its {name} is {dims(found)}, the model's {dims(there)}",
                _OTHER_MODEL,
            )


_OTHER_MODEL = "use the model that this adapter was trained on"


def unusable(where: str, what: str, hint: str = "fetch or train the adapter again") -> ModelError:
    """Returns the error for a fault in an adapter's files; all of them have this form."""
    return ModelError(f"{where} is not a usable adapter: {what}", hint)


def dims(shape: tuple[int, ...]) -> str:
    """Returns a shape as people read it: "64 × 32"."""
    return " × ".join(f"{d:,}" for d in shape) or "one number"
