"""A LoRA adapter in memory, as every format and engine of emlocal understands it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LoraPair:
    """What is added to one linear layer y = W x: scale · B (A x). Source: Hu et al. 2021, eq. 3."""

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

    Rows of B are in transformers' order: for architectures whose Q and K rows GGUF permutes, readers and
    writers of GGUF permute them.
    """

    pairs: Mapping[str, LoraPair]
    base_model: str = ""
    """What the adapter says that it was trained on; "" where it says nothing."""
