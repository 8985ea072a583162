"""The naive versions of the fused losses and learners: every prefix by itself, full logits, autograd."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from emlocal.backends.torch.model import lora_layers
from emlocal.em.losses import PolicyObjective
from tests.tiny_pair import ModelPair


@dataclass(frozen=True)
class Example:
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


BATCH = [Example((5, 6, 7), (8, 9, 10, 2)), Example((11,), (12,)), Example((3, 4, 5, 6, 7), (1, 20, 30))]
TOKENS = [token for each in BATCH for token in each.answer]
LENGTHS = [len(each.answer) for each in BATCH]


def load(pair: ModelPair) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32)
    return model


def log_p_of_prefixes(model: nn.Module, batch: Sequence[Example], temperature: float) -> Tensor:
    """Returns [M, V], one row for each answer token: without mask, padding or shift."""
    rows = [
        model(torch.tensor([[*each.prompt, *each.answer[:i]]])).logits[0, -1] / temperature
        for each in batch
        for i in range(len(each.answer))
    ]
    return torch.stack(rows).log_softmax(-1)


def entropies_of(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def policy_loss(
    log_p: Tensor,
    tokens: Sequence[int] | Tensor,
    advantages: Tensor,
    weights: Tensor,
    objective: PolicyObjective,
    *,
    old: Tensor,
    reference: Tensor,
    pull: Tensor | None,
) -> Tensor:
    """Computes the equations of `emlocal.em.losses` on full rows [M, V], for autograd."""
    now = log_p[torch.arange(len(log_p)), tokens]
    a, ratio = advantages.to(now.dtype), (now - old).exp()
    if objective.kind == "reinforce":
        loss = -a * now
    else:
        held = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
        loss = -torch.minimum(ratio * a, held * a)
    d = reference - now
    loss = loss + objective.beta * (d.exp() - d - 1) - objective.entropy_bonus * entropies_of(log_p)
    if pull is not None:
        loss = loss + pull * (now - old).abs()
    return (weights * loss).sum()


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Returns the gradients of the adapter's weights, layer by layer."""
    found = [p.grad for layer in lora_layers(model).values() for p in (layer.a, layer.b)]
    return [gradient for gradient in found if gradient is not None]


def assert_gradients(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Compares the gradients of the tiny pair's 14 layers, up to float32's rounding."""
    assert len(found) == len(wanted) == 28
    assert max(float(each.abs().max()) for each in wanted) > 1e-4
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * max(1e-3, float(theirs.abs().max()))
