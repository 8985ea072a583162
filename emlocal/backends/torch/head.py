"""The language-model head, a few rows at a time: logits of all tokens at once would take gigabytes."""

import torch
from torch import Tensor

CHUNK_BYTES = 80 << 20
"""Of one float32 buffer of logits."""


def rows_at_once(head: Tensor, chunk_bytes: int) -> int:
    """How many rows' float32 logits fit in so many bytes; 1 at least."""
    return max(1, chunk_bytes // (4 * head.shape[0]))


def chunk_logits(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """float32 [rows, V], divided by the temperature: a new buffer, the caller's to overwrite."""
    if head.dtype == torch.float32 or hidden.device.type != "cuda":
        logits = torch.mm(hidden.to(head.dtype), head.T).float()
    else:
        logits = torch.mm(hidden.to(head.dtype), head.T, out_dtype=torch.float32)
    return logits if temperature == 1 else logits.div_(temperature)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, [rows, 1], without a temporary of their size."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).squeeze(2)
