"""The fused EM-FT loss compared with a loop over rows in numpy and with autograd; its memory."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from emlocal.backends.torch.policy import em_ft_loss
from emlocal.em.losses import em_ft, tempered_by

M, H, V = 23, 16, 301


def inputs(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(5)
    hidden = (scale * torch.randn(M, H, generator=random)).to(dtype).requires_grad_()
    base = (scale * torch.randn(M, H, generator=random)).to(dtype)
    head = (0.5 * torch.randn(V, H, generator=random)).to(dtype)
    return hidden, base, head, torch.rand(M, generator=random)


def naive(hidden: Tensor, base: Tensor, head: Tensor, weights: Tensor, beta: float, t: float) -> Tensor:
    log_p = (hidden @ head.T / t).log_softmax(-1)
    log_p0 = (base @ head.T / t).log_softmax(-1)
    p = log_p.exp()
    return (weights * (-(p * log_p).sum(-1) + beta * (p * (log_p - log_p0)).sum(-1))).sum()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("rows", [1, 7, M, 100])
def test_value_and_gradient_are_autograds(beta: float, temperature: float, rows: int) -> None:
    hidden, base, head, weights = inputs()
    terms = em_ft_loss(
        hidden, head, weights, base_hidden=base, beta=beta, temperature=temperature, chunk_bytes=4 * V * rows
    )
    (got,) = torch.autograd.grad(3 * terms.loss, hidden)
    expected = naive(hidden.double(), base.double(), head.double(), weights.double(), beta, temperature)
    (want,) = torch.autograd.grad(3 * expected, hidden)
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_it_is_the_reference_row_by_row(beta: float) -> None:
    hidden, base, head, weights = inputs()
    terms = em_ft_loss(hidden, head, weights, base_hidden=base, beta=beta, temperature=0.7)
    z, z0 = (h.detach().double() @ head.double().T for h in (hidden, base))
    reference = em_ft(z.numpy(), z0.numpy(), beta=beta, temperature=0.7)
    assert np.allclose(terms.entropy, reference.entropy, atol=1e-5)
    assert np.allclose(terms.kl, reference.kl, atol=1e-5)
    (got,) = torch.autograd.grad(terms.loss, hidden)
    want = (weights.double().numpy()[:, None] * reference.gradient) @ head.double().numpy()
    assert np.abs(got.numpy() - want).max() <= 1e-5 * np.abs(want).max()


def test_the_references_gradient_is_the_slope_of_its_loss() -> None:
    random = np.random.default_rng(3)
    z, z0 = 3 * random.standard_normal((2, 4, 11))
    found = em_ft(z, z0, beta=1.3, temperature=0.8)

    def cost(logits: NDArray[np.float64]) -> NDArray[np.float64]:
        terms = em_ft(logits, z0, beta=1.3, temperature=0.8)
        return terms.entropy + 1.3 * terms.kl

    for i in range(11):
        step = np.zeros(11)
        step[i] = 1e-6
        assert np.allclose((cost(z + step) - cost(z - step)) / 2e-6, found.gradient[:, i], atol=1e-7)


def test_a_beta_above_one_is_at_rest_at_the_tempered_base() -> None:
    base = np.random.default_rng(1).standard_normal((3, 50)) * 2
    assert tempered_by(2.0) == 0.5
    at_rest = em_ft(base / tempered_by(1.25), base, beta=1.25)
    assert np.abs(at_rest.gradient).max() < 1e-12
    assert np.abs(em_ft(base, base, beta=1.25).gradient).max() > 1e-3
    assert tempered_by(1.0) == tempered_by(0.5) == tempered_by(0.0) == 0.0


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0])
def test_flat_and_one_hot_rows(scale: float) -> None:
    hidden, base, head, weights = inputs(scale)
    terms = em_ft_loss(hidden, head, weights, base_hidden=base, beta=1.0)
    (gradient,) = torch.autograd.grad(terms.loss, hidden)
    assert torch.isfinite(terms.loss)
    assert torch.isfinite(gradient).all()
    assert (terms.entropy >= -1e-5).all()
    assert (terms.entropy <= np.log(V) + 1e-5).all()


def test_bfloat16_states_keep_float32_entropies() -> None:
    hidden, base, head, weights = inputs(dtype=torch.bfloat16)
    terms = em_ft_loss(hidden, head.float(), weights, base_hidden=base, beta=0.5)
    reference = em_ft((hidden.detach().double() @ head.double().T).numpy())
    assert np.allclose(terms.entropy, reference.entropy, atol=1e-5)
    (gradient,) = torch.autograd.grad(terms.loss, hidden)
    assert gradient.dtype == torch.bfloat16


def test_no_positions_cost_nothing() -> None:
    hidden, _, head, _ = inputs()
    terms = em_ft_loss(hidden[:0], head, torch.zeros(0))
    assert terms.loss == 0
    assert terms.entropy.shape == (0,)


def test_the_kl_needs_a_base() -> None:
    hidden, _, head, weights = inputs()
    with pytest.raises(ValueError, match="base"):
        em_ft_loss(hidden, head, weights, beta=0.1)
