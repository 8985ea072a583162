"""The EM-FT loss from hidden states: the language-model head and the entropy of its rows in one function.

The logits of all tokens at once, [M, V], would take gigabytes (2,048 × 151,936 in float32: 1.2 GB, and
autograd keeps several of that size). Here they exist for a few rows at a time. Under LoRA the head is
frozen, so each chunk's gradient by its hidden states is formed at once, in the forward pass, while its
logits are there: two products a token instead of three, and nothing to keep but [M, H].

The equations are those of `emlocal.em.em_ft`, which this is tested against.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 80 << 20
"""Of one float32 buffer of logits."""


class Terms(NamedTuple):
    """What a batch of positions costs."""

    loss: Tensor
    """Scalar, Σ weight · (H + β·KL); differentiable by the hidden states."""
    entropy: Tensor
    """[M] float32, nats, detached."""
    kl: Tensor
    """[M] float32, nats, detached; zeros without a base."""


def em_ft_loss(
    hidden: Tensor,
    head: Tensor,
    weights: Tensor,
    *,
    base_hidden: Tensor | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Terms:
    """Σ_m weight_m · (H(p_m) + β·KL(p_m ‖ p⁰_m)), p = softmax(head · hidden / temperature).

    Args:
        hidden: [M, H], the states that the head reads, any float dtype.
        head: [V, H], frozen. float32 gives float32 logits; on CUDA bfloat16 does too, elsewhere not.
        weights: [M] float32, of each position in the sum.
        base_hidden: [M, H], the same positions' states without the adapter; needed for the KL.
        chunk_bytes: the size of a buffer of logits (there are two, four with a KL term), which decides how
            many rows are taken at a time.
    """
    if beta and base_hidden is None:
        raise ValueError("the KL term needs the hidden states of the base model")
    base = None if base_hidden is None else base_hidden.detach()
    loss, entropy, kl = _EMFTLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head, weights, base, beta, temperature, rows_at_once(head, chunk_bytes)
    )
    return Terms(loss, entropy, kl)


class _EMFTLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        weights: Tensor,
        base_hidden: Tensor | None,
        beta: float,
        temperature: float,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = hidden.shape[0]
        entropy = torch.empty(total, dtype=torch.float32, device=hidden.device)
        kl = torch.zeros_like(entropy)
        gradient = torch.empty_like(hidden)
        for start in range(0, total, rows):
            part = slice(start, start + rows)
            base = None if base_hidden is None else chunk_logits(base_hidden[part], head, temperature)
            logits = chunk_logits(hidden[part], head, temperature)
            entropy[part], kl_part, dlogits = _chunk(logits, base, beta)
            if kl_part is not None:
                kl[part] = kl_part
            scale = (weights[part] / temperature).unsqueeze(1)
            gradient[part] = torch.mm(dlogits.to(head.dtype), head).mul_(scale)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy, kl)
        loss = (weights * (entropy + beta * kl)).sum(dtype=torch.float32)
        return loss, entropy, kl

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None, None, None, None


def _chunk(z: Tensor, base: Tensor | None, beta: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """Entropy [rows], KL [rows] and ∂(H + β·KL)/∂z [rows, V], which overwrites z."""
    z -= z.amax(dim=1, keepdim=True)
    e = z.exp()
    total = e.sum(dim=1, keepdim=True)
    log_total = total.log()
    mean = row_dot(e, z) / total  # E[z], so H = log Σe − E[z]
    entropy = log_total - mean
    if base is None:
        gradient = z.sub_(mean).mul_(e).div_(-total)  # −p (log p + H) = −p (z − E[z])
        return entropy.squeeze(1), None, gradient
    base -= base.amax(dim=1, keepdim=True)
    log_total_base = base.logsumexp(dim=1, keepdim=True)
    mean_base = row_dot(e, base) / total
    kl = (mean - log_total) - (mean_base - log_total_base)
    # p ((β−1)(z − E[z]) − β (z⁰ − E[z⁰])): the constants of the logarithms cancel
    gradient = z.sub_(mean).mul_(beta - 1).sub_(base.sub_(mean_base), alpha=beta).mul_(e).div_(total)
    return entropy.squeeze(1), kl.squeeze(1), gradient


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
