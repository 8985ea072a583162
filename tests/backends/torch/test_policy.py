"""The fused policy gradient compared with autograd on full logits and with the numpy reference; its size."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emlocal.backends.torch.policy import (
    PolicyTerms,
    em_ft_loss,
    policy_gradient_loss,
    position_divergences,
    token_scores,
)
from emlocal.em.entropy import entropy, log_softmax
from emlocal.em.losses import PolicyObjective, policy_loss
from emlocal.em.relatives import position_divergence
from emlocal.em.rewards import self_certainty
from tests.backends.torch import naive

M, H, V = 23, 16, 301
OBJECTIVES = [
    PolicyObjective("reinforce"),
    PolicyObjective("reinforce", beta=0.4),
    PolicyObjective("ppo-clip"),
    PolicyObjective("ppo-clip", clip_low=0.05, clip_high=0.3, beta=0.1),
    PolicyObjective("ppo-clip", clip_low=math.inf, clip_high=math.inf),
    PolicyObjective("reinforce", entropy_bonus=-1.0),
    PolicyObjective("ppo-clip", beta=0.1, entropy_bonus=0.7),
]


class Inputs:
    """Hidden states, a head and the other inputs of a loss.

    Old and reference are near the policy, as in runs.
    """

    def __init__(self, scale: float = 1.0, dtype: torch.dtype = torch.float32, likely: int = 8) -> None:
        random = torch.Generator().manual_seed(5)
        states = scale * torch.randn(M, H, generator=random)
        self.hidden = states.to(dtype).requires_grad_()
        self.head = (0.5 * torch.randn(V, H, generator=random)).to(dtype)
        self.tokens = torch.randint(V, (M,), generator=random)
        self.tokens[:likely] = (self.hidden @ self.head.T)[:likely].argmax(-1)
        self.advantages = torch.randn(M, generator=random)
        self.weights = torch.rand(M, generator=random)
        now = self.log_p()[0].detach()
        self.old = (now + 0.3 * torch.randn(M, generator=random)).float()
        self.reference = (now + 0.5 * torch.randn(M, generator=random)).float()
        self.pull = (torch.arange(M) % 4 == 0).float()

    def log_p(self, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Computes log p from full logits in float64: of the tokens [M], of all [M, V].

        It is differentiable by `hidden`.
        """
        rows = (self.hidden.double() @ self.head.double().T / temperature).log_softmax(-1)
        return rows[torch.arange(M), self.tokens], rows

    def fused(self, objective: PolicyObjective, pull: bool = False, **more: Any) -> PolicyTerms:
        return policy_gradient_loss(
            self.hidden,
            self.head,
            self.tokens,
            self.advantages,
            self.weights,
            objective,
            old=self.old,
            reference=self.reference,
            pull=self.pull if pull else None,
            **more,
        )

    def naive(self, objective: PolicyObjective, pull: bool, temperature: float) -> Tensor:
        """Computes the equations on full logits, for autograd."""
        return naive.policy_loss(
            self.log_p(temperature)[1],
            self.tokens,
            self.advantages,
            self.weights,
            objective,
            old=self.old,
            reference=self.reference,
            pull=self.pull if pull else None,
        )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("pull", [False, True], ids=["", "kl-cov"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.7])
@pytest.mark.parametrize("rows", [1, 7, M, 100])
def test_value_and_gradient_are_autograds(
    objective: PolicyObjective, pull: bool, temperature: float, rows: int
) -> None:
    given = Inputs()
    terms = given.fused(objective, pull, temperature=temperature, chunk_bytes=4 * V * rows)
    (got,) = torch.autograd.grad(3 * terms.loss, given.hidden)
    expected = given.naive(objective, pull, temperature)
    (want,) = torch.autograd.grad(3 * expected, given.hidden)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert want.abs().max() > 1e-3
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("pull", [False, True], ids=["", "kl-cov"])
def test_it_is_the_reference_token_by_token(objective: PolicyObjective, pull: bool) -> None:
    given = Inputs()
    terms = given.fused(objective, pull)
    now, rows = (x.detach().numpy() for x in given.log_p())
    reference = policy_loss(
        now,
        given.advantages.numpy(),
        objective,
        old=given.old.numpy(),
        reference=given.reference.numpy(),
        pull=given.pull.numpy() if pull else None,
        entropies=entropy(rows),
    )
    assert terms.loss.item() == pytest.approx(given.weights.numpy() @ reference.loss, rel=1e-5)
    assert terms.clipped.numpy().tolist() == reference.clipped.tolist()
    assert np.allclose(terms.kl, reference.kl, atol=1e-5)
    if objective.clip_low == 0.05:
        assert 0 < reference.clipped.sum() < M
    (got,) = torch.autograd.grad(terms.loss, given.hidden)
    by_logits = -np.exp(rows)
    by_logits[np.arange(M), given.tokens] += 1
    slopes = given.weights.double().numpy() * reference.slope
    by_logits *= slopes[:, None]
    p, bonus = np.exp(rows), objective.entropy_bonus * given.weights.double().numpy()
    by_logits += bonus[:, None] * p * (rows + entropy(rows)[:, None])
    want = by_logits @ given.head.double().numpy()
    assert np.abs(got.numpy() - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_scores_are_those_of_the_reference(temperature: float, rows: int) -> None:
    given = Inputs()
    scores = token_scores(
        given.hidden, given.head, given.tokens, temperature=temperature, chunk_bytes=4 * V * rows
    )
    z = given.hidden.detach().double().numpy() @ given.head.double().numpy().T / temperature
    assert np.allclose(scores.log_prob.detach(), log_softmax(z)[np.arange(M), given.tokens], atol=1e-5)
    assert np.allclose(scores.entropy, entropy(z), atol=1e-5)
    assert np.allclose(scores.self_certainty, self_certainty(z), atol=1e-5)
    assert scores.log_prob.requires_grad
    assert not scores.entropy.requires_grad
    assert not scores.self_certainty.requires_grad


def test_log_probabilities_take_any_function_on_top() -> None:
    given = Inputs()
    scores = token_scores(given.hidden, given.head, given.tokens)
    (got,) = torch.autograd.grad((scores.log_prob.sin() * given.weights).sum(), given.hidden)
    (want,) = torch.autograd.grad((given.log_p()[0].sin() * given.weights).sum(), given.hidden)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_scores_without_a_gradient_are_the_same_bit_for_bit() -> None:
    given = Inputs()
    with_gradient = token_scores(given.hidden, given.head, given.tokens)
    with torch.no_grad():
        without = token_scores(given.hidden, given.head, given.tokens)
    for one, other in zip(with_gradient, without, strict=True):
        assert torch.equal(one, other)
        assert not other.requires_grad
    assert not token_scores(given.hidden.detach(), given.head, given.tokens).log_prob.requires_grad


def test_just_drawn_the_ratio_is_one_and_nothing_is_clipped() -> None:
    given = Inputs()
    given.old = token_scores(given.hidden, given.head, given.tokens).log_prob  # its graph does not matter
    ppo, reinforce = (given.fused(PolicyObjective(kind)) for kind in ("ppo-clip", "reinforce"))
    assert not ppo.clipped.any()
    got, want = (torch.autograd.grad(terms.loss, given.hidden)[0] for terms in (ppo, reinforce))
    assert torch.equal(got, want)
    assert ppo.loss.item() == pytest.approx(-(given.weights * given.advantages).sum().item(), rel=1e-5)


def test_micro_batches_add_up_to_the_step() -> None:
    given = Inputs()
    objective = PolicyObjective("ppo-clip", beta=0.1)
    (whole,) = torch.autograd.grad(given.fused(objective, pull=True).loss, given.hidden)
    for part in (slice(0, 9), slice(9, M)):
        terms = policy_gradient_loss(
            given.hidden[part],
            given.head,
            given.tokens[part],
            given.advantages[part],
            given.weights[part],
            objective,
            old=given.old[part],
            reference=given.reference[part],
            pull=given.pull[part],
        )
        torch.autograd.backward(terms.loss)
    assert given.hidden.grad is not None
    assert (given.hidden.grad - whole).abs().max() <= 1e-6 * whole.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [1, 7, M, 100])
def test_the_entropy_takes_any_function_on_top_where_that_is_asked_for(temperature: float, rows: int) -> None:
    given = Inputs()
    found = token_scores(
        given.hidden,
        given.head,
        given.tokens,
        temperature=temperature,
        entropy_too=True,
        chunk_bytes=4 * V * rows,
    )
    (got,) = torch.autograd.grad((found.entropy.sin() + 2 * found.log_prob).sum(), given.hidden)
    now, log_p = given.log_p(temperature)
    (want,) = torch.autograd.grad((naive.entropies_of(log_p).sin() + 2 * now).sum(), given.hidden)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert not found.self_certainty.requires_grad
    plain = token_scores(given.hidden, given.head, given.tokens, temperature=temperature)
    assert (plain.entropy - found.entropy).abs().max() < 1e-5


def test_minus_one_entropy_bonus_and_no_advantage_is_em_ft() -> None:
    given = Inputs()
    given.advantages.zero_()
    (got,) = torch.autograd.grad(given.fused(PolicyObjective(entropy_bonus=-1.0)).loss, given.hidden)
    fused = em_ft_loss(given.hidden, given.head, given.weights)
    (want,) = torch.autograd.grad(fused.loss, given.hidden)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [1, 3, 4, 6, 1000])
def test_divergences_are_those_of_the_reference_however_they_are_cut(temperature: float, rows: int) -> None:
    given, lengths = Inputs(), [9, 1, 13]
    states = torch.split(given.hidden.detach(), lengths)
    found = position_divergences(states, given.head, temperature=temperature, chunk_bytes=4 * V * rows)
    log_p = torch.split(given.log_p(temperature)[1].detach(), lengths)
    for t in range(13):
        at_t = [row[t].numpy() if t < len(row) else np.full(V, -math.log(V)) for row in log_p]
        assert found[t].item() == pytest.approx(position_divergence(at_t), rel=1e-4)
    assert found.shape == (13,)
    assert found.min() > 1


def test_divergences_hold_a_few_positions_at_a_time() -> None:
    given = Inputs()
    states = torch.split(given.hidden.detach(), [9, 1, 13])
    with Watched() as seen:
        position_divergences(states, given.head, chunk_bytes=4 * V * 6)
    assert seen.numbers == max(6 * V, V * H)


class Watched(TorchDispatchMode):
    """Records the largest number of elements of any result tensor, and the number of matrix products."""

    numbers = 0
    products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        self.products += function is torch.ops.aten.mm.default
        return out


@pytest.mark.parametrize("rows", [1, 5])
def test_the_logits_of_all_tokens_never_exist(rows: int) -> None:
    given = Inputs()
    with Watched() as seen:
        terms = given.fused(OBJECTIVES[3], pull=True, chunk_bytes=4 * V * rows)
        torch.autograd.backward(terms.loss)
    assert seen.numbers == max(rows * V, V * H)  # V · H: the head, transposed for a product
    with Watched() as seen:
        torch.autograd.backward(given.naive(OBJECTIVES[3], pull=True, temperature=1.0))
    assert seen.numbers == M * V


def test_a_gradient_costs_one_product_more_and_only_where_it_is_wanted() -> None:
    given, chunks = Inputs(), 5
    in_fives = {"chunk_bytes": 4 * V * 5}
    with Watched() as seen:
        log_prob = token_scores(given.hidden, given.head, given.tokens, **in_fives).log_prob
        torch.autograd.backward(log_prob.sum())
    assert seen.products == 2 * chunks
    with Watched() as seen:
        found = token_scores(given.hidden, given.head, given.tokens, entropy_too=True, **in_fives)
        torch.autograd.backward((found.log_prob + found.entropy).sum())
    assert seen.products == 3 * chunks
    with Watched() as seen, torch.no_grad():
        token_scores(given.hidden, given.head, given.tokens, **in_fives)
    assert seen.products == chunks


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_flat_and_one_hot_rows(scale: float) -> None:
    given = Inputs(scale, likely=M)
    terms = given.fused(OBJECTIVES[3], pull=True)
    (gradient,) = torch.autograd.grad(terms.loss, given.hidden)
    assert torch.isfinite(terms.loss)
    assert torch.isfinite(gradient).all()
    assert (terms.scores.log_prob <= 0).all()
    assert (terms.scores.self_certainty >= -1e-5).all()
    assert (terms.kl >= 0).all()


def test_bfloat16_states_keep_float32_scores() -> None:
    given = Inputs(dtype=torch.bfloat16)
    given.head = given.head.float()
    terms = given.fused(OBJECTIVES[3])
    expected = given.naive(OBJECTIVES[3], pull=False, temperature=1.0)
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (got,) = torch.autograd.grad(terms.loss, given.hidden)
    (want,) = torch.autograd.grad(expected, given.hidden)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= 0.01 * want.abs().max()


def test_no_tokens_cost_nothing() -> None:
    given = Inputs()
    none = torch.zeros(0)
    terms = policy_gradient_loss(
        given.hidden[:0], given.head, given.tokens[:0], none, none, PolicyObjective()
    )
    torch.autograd.backward(terms.loss)
    assert terms.loss == 0
    assert terms.scores.entropy.shape == (0,)


def test_what_is_needed_must_be_there() -> None:
    given = Inputs()
    fixed = (given.hidden, given.head, given.tokens, given.advantages, given.weights)
    with pytest.raises(ValueError, match="drawn with"):
        policy_gradient_loss(*fixed, PolicyObjective("ppo-clip"))
    with pytest.raises(ValueError, match="drawn with"):
        policy_gradient_loss(*fixed, PolicyObjective(), pull=given.pull)
    with pytest.raises(ValueError, match="reference"):
        policy_gradient_loss(*fixed, PolicyObjective(beta=0.1))
