"""Losses of EM-FT and EM-RL from hidden states, and the scores of drawn tokens that rewards need.

The logits of all tokens at once, [M, V], would take gigabytes (2,048 × 151,936 in float32: 1.2 GB, and
autograd keeps several of that size). Here they exist for a few rows at a time.

EM-FT: the language-model head and the entropy of its rows are one function. Under LoRA the head is frozen, so
each chunk's gradient by its hidden states is formed at once, in the forward pass, while its logits exist.
That takes two products per token instead of three, and keeps only [M, H].

EM-RL: the gradient of log π(y_t) by the hidden state, (head[y_t] − Σ_v p_v head[v]) / T, has the hidden
state's own size. It is formed in the forward pass, too. Whatever is computed from the log-probabilities then
only scales each token's row of it. So every loss on log-probabilities is fused by being written in plain
torch on [M] numbers, and a backward pass never meets the vocabulary.

The equations are those of `emlocal.em.losses` and `emlocal.em.rewards`, which this is tested against.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emlocal.em.losses import PolicyObjective
from emlocal.em.relatives import LARGEST_GAP

CHUNK_BYTES = 80 << 20
"""Bytes of one float32 buffer of logits."""


class Terms(NamedTuple):
    """The EM-FT loss of a batch of positions, and its parts."""

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
    """Returns Σ_m weight_m · (H(p_m) + β·KL(p_m ‖ p⁰_m)), p = softmax(head · hidden / temperature).

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
            entropy[part], kl_part, dlogits = _entropy_chunk(logits, base, beta)
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


def _entropy_chunk(z: Tensor, base: Tensor | None, beta: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns entropy [rows], KL [rows] and ∂(H + β·KL)/∂z [rows, V], which overwrites z."""
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
    """Returns how many rows' float32 logits fit in this many bytes; at least 1."""
    return max(1, chunk_bytes // (4 * head.shape[0]))


def chunk_logits(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """Returns logits divided by the temperature, float32 [rows, V]: a new buffer, free to overwrite."""
    if head.dtype == torch.float32 or hidden.device.type != "cuda":
        logits = torch.mm(hidden.to(head.dtype), head.T).float()
    else:
        logits = torch.mm(hidden.to(head.dtype), head.T, out_dtype=torch.float32)
    return logits if temperature == 1 else logits.div_(temperature)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Returns the products of two matrices' rows, [rows, 1], without a temporary array of their size."""
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).squeeze(2)


class TokenScores(NamedTuple):
    """Scores of each token and the distribution it was drawn from, all [M] float32, nats."""

    log_prob: Tensor
    """log π(y_t | y_<t); differentiable by the hidden states."""
    entropy: Tensor
    """H(p_t); differentiable on request."""
    self_certainty: Tensor
    """KL(U ‖ p_t), detached."""


class PolicyTerms(NamedTuple):
    """The EM-RL loss of a batch of tokens, and its parts."""

    loss: Tensor
    """Scalar, Σ weight · loss; differentiable by the hidden states."""
    scores: TokenScores
    """The tokens' scores, all detached."""
    clipped: Tensor
    """[M] bool: whether the token is held at the clip."""
    kl: Tensor
    """[M] float32, k3 in nats, detached; zeros without a reference."""


def token_scores(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    entropy_too: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenScores:
    """Returns, in one pass over the vocabulary, the scores that rewards and losses are computed from.

    If hidden states need no gradient (rollouts, the reference), none is formed.

    Args:
        hidden: [M, H], the states that predict the tokens, any float dtype.
        head: [V, H], frozen, of the dtypes that `em_ft_loss` takes.
        tokens: [M] int64, those that were drawn.
        temperature: T > 0, of p = softmax(head · hidden / T).
        entropy_too: make the entropy differentiable as well, by one more product of the head's size.
        chunk_bytes: the size of a buffer of logits (there are two), which decides how many rows are taken at
            a time.
    """
    wanted = hidden.requires_grad and torch.is_grad_enabled()
    log_prob, entropy, certainty = _TokenScores.apply(  # type: ignore[no-untyped-call]
        hidden, head, tokens, temperature, rows_at_once(head, chunk_bytes), wanted, entropy_too
    )
    return TokenScores(log_prob, entropy, certainty)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        tokens: Tensor,
        temperature: float,
        rows: int,
        wanted: bool,
        entropy_too: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = hidden.shape[0]
        log_prob = torch.empty(total, dtype=torch.float32, device=hidden.device)
        entropy, certainty = torch.empty_like(log_prob), torch.empty_like(log_prob)
        gradient = torch.empty_like(hidden) if wanted else None
        of_entropy = torch.empty_like(hidden) if wanted and entropy_too else None
        for start in range(0, total, rows):
            part = slice(start, start + rows)
            chosen = tokens[part].unsqueeze(1)
            z = chunk_logits(hidden[part], head, temperature)
            found, p, mean = _chunk(z, chosen)
            log_prob[part], entropy[part], certainty[part] = found
            if of_entropy is not None:
                by_logits = z.sub_(mean).mul_(p)  # ∂H/∂z = −p (z − E[z])
                of_entropy[part] = torch.mm(by_logits.to(head.dtype), head).div_(-temperature)
            if gradient is not None:
                by_logits = p.neg_().scatter_add_(1, chosen, torch.ones_like(p[:, :1]))
                gradient[part] = torch.mm(by_logits.to(head.dtype), head).div_(temperature)
        ctx.save_for_backward(gradient, of_entropy)
        ctx.mark_non_differentiable(*((certainty,) if entropy_too else (entropy, certainty)))
        return log_prob, entropy, certainty

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, of_entropy = ctx.saved_tensors
        by_hidden = gradient * upstream[0].unsqueeze(1)
        if of_entropy is not None:
            by_hidden += of_entropy * upstream[1].unsqueeze(1)
        return by_hidden.to(gradient.dtype), *(None,) * 6


def _chunk(z: Tensor, chosen: Tensor) -> tuple[TokenScores, Tensor, Tensor]:
    """Returns scores [rows] each, p [rows, V] and E[z] [rows, 1]; subtracts each row's maximum from z."""
    z -= z.amax(dim=1, keepdim=True)
    e = z.exp()
    total = e.sum(dim=1, keepdim=True)
    log_total = total.log()
    log_prob = z.gather(1, chosen) - log_total
    mean = row_dot(e, z) / total
    entropy = log_total - mean  # H = log Σe − E[z]
    certainty = log_total - z.mean(dim=1, keepdim=True) - math.log(z.shape[1])
    scores = TokenScores(log_prob.squeeze(1), entropy.squeeze(1), certainty.squeeze(1))
    return scores, e.div_(total), mean


def policy_gradient_loss(
    hidden: Tensor,
    head: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    weights: Tensor,
    objective: PolicyObjective,
    *,
    old: Tensor | None = None,
    reference: Tensor | None = None,
    pull: Tensor | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> PolicyTerms:
    """Returns Σ_t weight_t · loss_t, with the losses of `emlocal.em.losses.policy_loss`.

    Args:
        hidden, head, tokens, temperature, chunk_bytes: as for `token_scores`.
        advantages: [M] float32, of each token (after Clip-Cov's zeros, TW-GRPO's weights).
        weights: [M] float32, `averaging_weights` of the whole step, so that micro-batches add up to it.
        old: [M] float32, log-probabilities when drawn, by `token_scores` (another engine rounds differently);
            for ppo-clip and `pull`.
        reference: [M] float32, log-probabilities without the adapter; for beta.
        pull: [M] float32, KL-Cov's coefficients.
    Raises:
        ValueError: a needed array is missing.
    """
    if old is None and (objective.kind == "ppo-clip" or pull is not None):
        raise ValueError("ppo-clip and KL-Cov need the log-probabilities that the tokens were drawn with")
    if objective.beta and reference is None:
        raise ValueError("the KL term needs the log-probabilities of the reference")
    scores = token_scores(
        hidden,
        head,
        tokens,
        temperature=temperature,
        entropy_too=bool(objective.entropy_bonus),
        chunk_bytes=chunk_bytes,
    )
    now = scores.log_prob
    moved = torch.zeros_like(now) if old is None else now - old.detach()
    clipped = torch.zeros_like(now, dtype=torch.bool)
    loss = -advantages * now
    if objective.kind == "ppo-clip":
        loss, clipped = _ppo_clip(moved.exp(), advantages, objective)
    kl = torch.zeros_like(now)
    if reference is not None:
        gap = reference.detach() - now
        kl = gap.expm1() - gap
        loss = loss + objective.beta * kl
    if pull is not None:
        loss = loss + pull * moved.abs()
    if objective.entropy_bonus:
        loss = loss - objective.entropy_bonus * scores.entropy
    detached = TokenScores(*(score.detach() for score in scores))
    return PolicyTerms((weights * loss).sum(), detached, clipped, kl.detach())


def _ppo_clip(ratio: Tensor, advantages: Tensor, objective: PolicyObjective) -> tuple[Tensor, Tensor]:
    """Returns the loss and whether it is clipped, each [M]."""
    free = ratio * advantages
    held = ratio.detach().clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantages
    clipped = held < free
    return -torch.where(clipped, held, free), clipped.detach()


def position_divergences(
    states: Sequence[Tensor], head: Tensor, *, temperature: float = 1.0, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Returns how much a group's G answers disagree at each position, [T] float32, T that of the longest.

    It is `emlocal.em.relatives.position_divergence` of each position, a few at a time. The authors hold [G,
    T, V] numbers.

    Args:
        states: of each answer, [its tokens, H]: those that predict its tokens.
        head, temperature, chunk_bytes: as for `token_scores`; at least G rows are taken at a time.
    """
    longest, uniform = max(map(len, states)), -math.log(head.shape[0])
    found = torch.empty(longest, dtype=torch.float32, device=head.device)
    width = max(1, rows_at_once(head, chunk_bytes) // len(states))
    for start in range(0, longest, width):
        stop = min(start + width, longest)
        log_p = torch.full((len(states), stop - start, head.shape[0]), uniform, device=head.device)
        for row, of_answer in zip(log_p, states, strict=True):
            part = of_answer[start:stop]
            if len(part):
                row[: len(part)] = chunk_logits(part, head, temperature).log_softmax(dim=1)
        d = (log_p.mean(dim=0) - log_p).clamp_(-LARGEST_GAP, LARGEST_GAP)
        found[start:stop] = (d.expm1() - d).sum(dim=2).mean(dim=0)
    return found
