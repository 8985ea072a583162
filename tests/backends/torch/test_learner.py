"""The torch learner compared with a loop over single prefixes: without mask, padding or shift."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from emlocal.backends.learner import Descent, EntropyObjective
from emlocal.backends.torch.learner import TorchEntropyLearner, TorchLearner
from emlocal.backends.torch.model import attach, base_weights, linear_layers
from emlocal.errors import ModelError
from emlocal.models.adapters.adapter import Adapter
from emlocal.training.engines import new_adapter
from emlocal.training.settings import FineTuneSettings
from tests.backends.torch.naive import (
    BATCH,
    LENGTHS,
    assert_gradients,
    entropies_of,
    gradients_of,
    load,
    log_p_of_prefixes,
)
from tests.tiny_pair import ModelPair, random_adapter

SETTINGS = FineTuneSettings(rank=4, alpha=8)


def learner(
    pair: ModelPair, adapter: Adapter, checkpointing: bool = False, **objective: Any
) -> TorchEntropyLearner:
    """Makes a learner; `kl_beta` measures the KL too."""
    descent = Descent(max_grad_norm=objective.pop("max_grad_norm", 1.0))
    asked = EntropyObjective(**{"measures_kl": bool(objective.get("kl_beta")), **objective})
    return TorchEntropyLearner(load(pair), adapter, descent, asked, checkpointing=checkpointing)


def by_loop(
    pair: ModelPair, adapter: Adapter, weights: Sequence[float], beta: float, t: float
) -> tuple[float, list[torch.Tensor]]:
    """Computes the loss and its gradients, one prefix after the other."""
    model = load(pair)
    model.requires_grad_(False)
    attach(model, adapter)
    log_p = log_p_of_prefixes(model, BATCH, t)
    with torch.no_grad(), base_weights(model):
        log_p0 = log_p_of_prefixes(model, BATCH, t)
    kl = (log_p.exp() * (log_p - log_p0)).sum(-1)
    loss = torch.tensor(weights).repeat_interleave(torch.tensor(LENGTHS)) @ (entropies_of(log_p) + beta * kl)
    loss.backward()
    return loss.item(), gradients_of(model)


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.5, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_are_those_of_a_loop_over_prefixes(
    pair: ModelPair, beta: float, temperature: float, checkpointing: bool
) -> None:
    adapter, weights = random_adapter(), [0.1, 0.7, 0.2]
    ours = learner(pair, adapter, checkpointing, kl_beta=beta, temperature=temperature)
    terms = ours.accumulate(BATCH, weights)
    loss, gradients = by_loop(pair, adapter, weights, beta, temperature)
    assert terms.tokens == 8
    assert terms.loss == pytest.approx(loss, abs=1e-5)
    assert_gradients(gradients_of(ours.model), gradients)


def test_between_gradients_a_checkpointed_model_keeps_keys_and_values(pair: ModelPair) -> None:
    ours = learner(pair, random_adapter(), checkpointing=True)
    ours.accumulate(BATCH, [1.0] * 3)
    cached = ours.model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    assert cached.get_seq_length() == 3


def test_micro_batches_make_the_same_gradient(pair: ModelPair) -> None:
    whole, parts = (learner(pair, random_adapter(), kl_beta=1.0) for _ in range(2))
    weights = [0.2, 0.3, 0.5]
    together = whole.accumulate(BATCH, weights)
    apart = [parts.accumulate([each], [w]) for each, w in zip(BATCH, weights, strict=True)]
    assert sum(t.loss for t in apart) == pytest.approx(together.loss, abs=1e-5)
    assert sum(t.kl for t in apart) == pytest.approx(together.kl, abs=1e-5)
    assert whole.update(1e-3) == pytest.approx(parts.update(1e-3), rel=1e-4)


def test_a_step_lowers_the_entropy(pair: ModelPair) -> None:
    ours = learner(pair, new_adapter(linear_layers(load(pair)) | {}, SETTINGS))
    entropies = []
    for _ in range(5):
        entropies.append(ours.accumulate(BATCH, [1 / 8] * 3).entropy)
        ours.update(1e-2)
    assert all(later < earlier for earlier, later in pairwise(entropies))


def test_a_kl_that_is_only_measured_changes_no_gradient(pair: ModelPair) -> None:
    with_it, without = (learner(pair, random_adapter(), measures_kl=m) for m in (True, False))
    assert with_it.accumulate(BATCH, [1.0] * 3).kl > 0.01
    assert without.accumulate(BATCH, [1.0] * 3).kl == 0
    assert with_it.update(1e-3) == pytest.approx(without.update(1e-3), rel=1e-4)


def test_a_new_adapter_changes_nothing_and_has_no_kl(pair: ModelPair) -> None:
    layers = linear_layers(load(pair))
    ours = learner(pair, new_adapter(layers, SETTINGS), kl_beta=2.0)
    assert ours.accumulate(BATCH, [1.0] * 3).kl == pytest.approx(0, abs=1e-6)
    again = new_adapter(layers, SETTINGS)
    for name, pair_ in ours.adapter().pairs.items():
        assert np.array_equal(pair_.a, again.pairs[name].a)
        assert not pair_.b.any()


def test_a_state_goes_on_bit_for_bit(pair: ModelPair) -> None:
    one = learner(pair, new_adapter(linear_layers(load(pair)), SETTINGS))
    for _ in range(3):
        one.accumulate(BATCH, [1 / 8] * 3)
        one.update(1e-3)
    state = one.state()
    two = learner(pair, new_adapter(linear_layers(load(pair)), FineTuneSettings(rank=4, alpha=8, seed=7)))
    two.restore(state)
    for trained in (one, two):
        trained.accumulate(BATCH, [1 / 8] * 3)
        trained.update(1e-3)
    assert one.state().keys() == two.state().keys()
    for name, value in one.state().items():
        assert np.array_equal(value, two.state()[name]), name
    with pytest.raises(ValueError, match="lora_A"):
        two.restore({})


def test_a_gradient_that_is_not_finite_changes_nothing(pair: ModelPair) -> None:
    ours = learner(pair, random_adapter())
    before = ours.adapter()
    ours.accumulate(BATCH, [float("nan")] * 3)
    assert not np.isfinite(ours.update(1e-3))
    for name, pair_ in ours.adapter().pairs.items():
        assert np.array_equal(pair_.a, before.pairs[name].a)
    ours.accumulate(BATCH, [1.0] * 3)
    assert np.isfinite(ours.update(1e-3))


def test_gradients_are_cut_to_their_greatest_length(pair: ModelPair) -> None:
    short, long = (learner(pair, random_adapter(), max_grad_norm=n) for n in (1e-3, 1e9))
    for ours in (short, long):
        ours.accumulate(BATCH, [1.0] * 3)
        ours.update(1e-3)
    lengths = [
        np.sqrt(
            sum(float((s.astype("f8") ** 2).sum()) for n, s in ours.state().items() if n.endswith("mean"))
        )
        for ours in (short, long)
    ]
    assert lengths[0] == pytest.approx(1e-4, rel=1e-3)  # a tenth of the gradient: Adam's first moment
    assert lengths[1] > 1e-3


def test_a_head_that_bends_its_logits_is_refused(pair: ModelPair) -> None:
    model = load(pair)
    head = model.get_submodule("lm_head")
    head.register_forward_hook(lambda module, inputs, output: 3 * (output / 3).tanh())
    with pytest.raises(ModelError, match="not the plain product"):
        TorchLearner(model, random_adapter(), Descent())
