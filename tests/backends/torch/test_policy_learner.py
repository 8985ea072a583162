"""The policy learner on torch compared with a loop over single prefixes on full logits."""

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from emlocal.backends.learner import Descent, TokenLosses
from emlocal.backends.torch.learner import TorchPolicyLearner
from emlocal.backends.torch.model import attach, base_weights, linear_layers
from emlocal.em.entropy import entropy
from emlocal.em.losses import PolicyObjective
from emlocal.em.relatives import position_divergence
from emlocal.em.rewards import self_certainty
from emlocal.training.engines import new_adapter
from emlocal.training.rl_settings import RLSettings
from tests.backends.torch import naive
from tests.backends.torch.naive import BATCH, LENGTHS, TOKENS, assert_gradients, gradients_of, load
from tests.tiny_pair import ModelPair, random_adapter

M = len(TOKENS)
EVERYTHING = PolicyObjective("ppo-clip", clip_low=0.05, clip_high=0.3, beta=0.4, entropy_bonus=0.3)
OBJECTIVES = [
    PolicyObjective("reinforce"),
    PolicyObjective("reinforce", beta=0.4),
    PolicyObjective("reinforce", entropy_bonus=-1.0),
    PolicyObjective("ppo-clip"),
    PolicyObjective("ppo-clip", clip_low=math.inf, clip_high=math.inf),
    EVERYTHING,
]


def learner(pair: ModelPair, objective: PolicyObjective = EVERYTHING, **more: Any) -> TorchPolicyLearner:
    return TorchPolicyLearner(load(pair), random_adapter(), Descent(), objective, **more)


def full_model(pair: ModelPair) -> nn.Module:
    """Returns the same model with nothing of emlocal but the adapter."""
    model = load(pair)
    model.requires_grad_(False)
    attach(model, random_adapter())
    return model


@pytest.fixture(scope="module")
def losses(pair: ModelPair) -> TokenLosses:
    """Returns losses of the batch's tokens: some at either clip limit, some not."""
    random = torch.Generator().manual_seed(3)
    now = full_rows(pair, 1.0)[torch.arange(M), TOKENS]
    advantages, old, reference = (torch.randn(M, generator=random).numpy() for _ in range(3))
    return TokenLosses(
        advantages,
        np.linspace(0.05, 0.2, M, dtype=np.float32),
        now.numpy() + 0.3 * old,
        now.numpy() + 0.5 * reference,
        np.array([0, 0.8, 0, 0, 0.8, 0, 0.8, 0], np.float32),
    )


def full_rows(pair: ModelPair, temperature: float, *, base: bool = False) -> Tensor:
    model = full_model(pair)
    with torch.no_grad():
        if not base:
            return naive.log_p_of_prefixes(model, BATCH, temperature)
        with base_weights(model):
            return naive.log_p_of_prefixes(model, BATCH, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("base", [False, True])
def test_scores_are_those_of_a_loop_over_prefixes(pair: ModelPair, temperature: float, base: bool) -> None:
    ours = learner(pair, temperature=temperature)
    scores, other = ours.score(BATCH, base=base), ours.score(BATCH, base=not base)
    rows = full_rows(pair, temperature, base=base).double().numpy()
    assert np.allclose(scores.log_probs, rows[np.arange(M), TOKENS], atol=1e-5)
    assert np.allclose(scores.entropies, entropy(rows), atol=1e-5)
    assert np.allclose(scores.self_certainties, self_certainty(rows), atol=1e-5)
    for name, found in vars(scores).items():
        assert (found.shape, found.dtype) == ((M,), np.float32)
        assert np.abs(found - vars(other)[name]).max() > 0.01, name  # the adapter matters
    assert not gradients_of(ours.model)


def test_a_new_adapter_is_the_base_bit_for_bit(pair: ModelPair) -> None:
    adapter = new_adapter(linear_layers(load(pair)), RLSettings(rank=4))
    ours = TorchPolicyLearner(load(pair), adapter, Descent(), EVERYTHING)
    now, base = (vars(ours.score(BATCH, base=each)) for each in (False, True))
    for name in now:
        assert np.array_equal(now[name], base[name]), name


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("pull", [False, True], ids=["", "kl-cov"])
@pytest.mark.parametrize(("temperature", "checkpointing"), [(1.0, False), (0.6, False), (1.0, True)])
def test_loss_and_gradient_are_those_of_a_loop_over_prefixes(
    pair: ModelPair,
    losses: TokenLosses,
    objective: PolicyObjective,
    pull: bool,
    temperature: float,
    checkpointing: bool,
) -> None:
    given = losses if pull else replace(losses, pull=None)
    ours = learner(pair, objective, temperature=temperature, checkpointing=checkpointing)
    terms = ours.accumulate(BATCH, given)
    model = full_model(pair)
    log_p = naive.log_p_of_prefixes(model, BATCH, temperature)
    tensors = {name: None if each is None else torch.from_numpy(each) for name, each in vars(given).items()}
    loss = naive.policy_loss(log_p, TOKENS, objective=objective, **tensors)  # type: ignore[arg-type]
    loss.backward()
    assert terms.tokens == M
    assert terms.loss == pytest.approx(loss.item(), abs=1e-5)
    assert terms.entropy == pytest.approx(naive.entropies_of(log_p).sum().item(), abs=1e-4)
    gap = given.reference - log_p[torch.arange(M), TOKENS].detach().numpy()
    assert terms.kl == pytest.approx((np.exp(gap) - gap - 1).sum(), abs=1e-4)
    assert_gradients(gradients_of(ours.model), gradients_of(model))


def test_clipped_tokens_are_counted(pair: ModelPair, losses: TokenLosses) -> None:
    now = full_rows(pair, 1.0)[torch.arange(M), TOKENS].numpy()
    assert losses.old is not None
    ratio, a = np.exp(now - losses.old), losses.advantages
    clipped = sum((r > 1.3 and x > 0) or (r < 0.95 and x < 0) for r, x in zip(ratio, a, strict=True))
    assert 0 < clipped < M
    assert learner(pair).accumulate(BATCH, losses).clipped == clipped


def test_micro_batches_add_up(pair: ModelPair, losses: TokenLosses) -> None:
    whole, parts = learner(pair), learner(pair)
    together = whole.accumulate(BATCH, losses)
    ends = np.cumsum(LENGTHS)
    places = [np.arange(end - n, end) for end, n in zip(ends, LENGTHS, strict=True)]
    apart = [parts.accumulate([BATCH[i]], losses.of(places[i])) for i in (2, 0, 1)]
    for name, value in vars(together).items():
        assert sum(vars(terms)[name] for terms in apart) == pytest.approx(value, abs=1e-5), name
    assert_gradients(gradients_of(parts.model), gradients_of(whole.model))
    reordered = [BATCH[i] for i in (2, 0, 1)], losses.of(np.concatenate([places[i] for i in (2, 0, 1)]))
    parts.forget()
    parts.accumulate(*reordered)
    assert_gradients(gradients_of(parts.model), gradients_of(whole.model))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_divergences_are_those_of_full_rows(pair: ModelPair, temperature: float) -> None:
    found = learner(pair, temperature=temperature).divergences(BATCH)
    rows = torch.split(full_rows(pair, temperature), LENGTHS)
    vocabulary = rows[0].shape[1]
    for t in range(max(LENGTHS)):
        ended = torch.full((vocabulary,), -math.log(vocabulary))
        at_t = torch.stack([row[t] if t < len(row) else ended for row in rows])
        assert found[t] == pytest.approx(position_divergence(at_t.numpy()), rel=1e-4)
    assert found.shape == (max(LENGTHS),)
    assert found.dtype == np.float32


def test_answers_that_agree_have_no_divergence(pair: ModelPair) -> None:
    assert np.abs(learner(pair).divergences([BATCH[0]] * 3)).max() < 1e-4


def test_a_step_moves_probabilities_where_advantages_point(pair: ModelPair) -> None:
    ours = learner(pair, PolicyObjective("reinforce"))
    signs = np.repeat(np.array([1, -1, 1], np.float32), LENGTHS)
    before = ours.score(BATCH).log_probs
    for _ in range(3):
        ours.accumulate(BATCH, TokenLosses(signs, np.full(M, 1 / M, np.float32)))
        ours.update(1e-3)
    assert (np.sign(ours.score(BATCH).log_probs - before) == signs).all()


def test_scoring_with_checkpointing_is_the_same_and_says_nothing(pair: ModelPair) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = learner(pair, checkpointing=True).score(BATCH)
    for one, other in zip(vars(found).values(), vars(learner(pair).score(BATCH)).values(), strict=True):
        assert np.array_equal(one, other)


def test_what_is_needed_must_be_there(pair: ModelPair, losses: TokenLosses) -> None:
    ours = learner(pair)
    for missing in ("old", "reference"):
        with pytest.raises(ValueError, match=r"drawn with|reference"):
            ours.accumulate(BATCH, replace(losses, **{missing: None}))
    assert not gradients_of(ours.model)
