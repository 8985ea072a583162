"""The MLX learner compared with the reference loss and the torch learner, which is compared with a loop."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.nn import Embedding, Linear, QuantizedEmbedding, QuantizedLinear, quantize
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM

from emlocal.backends.learner import Descent, EntropyObjective
from emlocal.backends.mlx.learner import Head, MLXEntropyLearner, em_ft_terms
from emlocal.backends.mlx.model import base_weights, linear_layers, out_of_memory
from emlocal.backends.torch.learner import TorchEntropyLearner
from emlocal.backends.torch.model import linear_layers as layers_of_torch
from emlocal.backends.torch.model import lora_layers
from emlocal.em.losses import em_ft
from emlocal.errors import ModelError
from emlocal.models.adapters.adapter import Adapter
from emlocal.training.engines import new_adapter
from emlocal.training.settings import FineTuneSettings
from tests.tiny_pair import ModelPair, random_adapter, write_pair

SETTINGS = FineTuneSettings(rank=4, alpha=8)


@dataclass(frozen=True)
class Example:
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


BATCH = [Example((5, 6, 7), (8, 9, 10, 2)), Example((11,), (12,)), Example((3, 4, 5, 6, 7), (1, 20, 30))]
WEIGHTS = [0.1, 0.7, 0.2]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelPair:
    return write_pair(tmp_path_factory.mktemp("pair"), request.param)


def load(folder: Path) -> Any:
    config = {"rope_theta": 10000.0}  # transformers 5 stores it elsewhere
    return load_model(folder, model_config=config)[0]


def learner(
    pair: ModelPair, adapter: Adapter, checkpointing: bool = False, descent: Descent = Descent(), **more: Any
) -> MLXEntropyLearner:
    """Makes a learner; `kl_beta` measures the KL too."""
    objective = EntropyObjective(**{"measures_kl": bool(more.get("kl_beta")), **more})
    return MLXEntropyLearner(load(pair.folder), adapter, descent, objective, checkpointing=checkpointing)


def torch_learner(
    pair: ModelPair, adapter: Adapter, descent: Descent = Descent(), **more: Any
) -> TorchEntropyLearner:
    model = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32)
    objective = EntropyObjective(**{"measures_kl": bool(more.get("kl_beta")), **more})
    return TorchEntropyLearner(model, adapter, descent, objective)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("head", ["linear", "embeddings"])
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (1.5, 1.0), (0.3, 0.5)])
def test_the_chunked_loss_is_the_references(quantized, head, beta, temperature) -> None:
    rng = np.random.default_rng(0)
    hidden, base = (rng.normal(size=(7, 32)).astype(np.float32) for _ in range(2))
    weights = rng.uniform(0.1, 2, 7).astype(np.float32)
    layer = Linear(32, 96, bias=False) if head == "linear" else Embedding(96, 32)
    layer.weight = mx.array(rng.normal(size=(96, 32)).astype(np.float32))
    matrix = np.array(layer.weight)
    if quantized:
        layer = layer.to_quantized(group_size=32, bits=4)
        matrix = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=4))
    terms = em_ft_terms(
        mx.array(hidden),
        Head(layer),
        mx.array(weights),
        base_hidden=mx.array(base) if beta else None,
        beta=beta,
        temperature=temperature,
        chunk_bytes=2 * 4 * 96,
    )
    wide = matrix.astype(np.float64)
    expected = em_ft(hidden @ wide.T, base @ wide.T if beta else None, beta=beta, temperature=temperature)
    gradient = weights[:, None] * (expected.gradient @ wide)
    np.testing.assert_allclose(np.array(terms.entropy), expected.entropy, atol=2e-5)
    np.testing.assert_allclose(np.array(terms.kl), expected.kl, atol=2e-5)
    np.testing.assert_allclose(np.array(terms.gradient), gradient, atol=2e-5 * np.abs(gradient).max())


def test_a_bfloat16_head_has_float32_logits() -> None:
    layer = Linear(32, 96, bias=False)
    layer.set_dtype(mx.bfloat16)
    hidden = mx.random.normal((3, 32), key=mx.random.key(0)).astype(mx.bfloat16)
    expected = np.array(hidden.astype(mx.float32)) @ np.array(layer.weight.astype(mx.float32)).T
    np.testing.assert_allclose(np.array(Head(layer).logits(hidden)), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("beta", "temperature", "checkpointing"), [(0.0, 1.0, False), (1.5, 1.0, False), (0.3, 0.5, True)]
)
def test_it_learns_what_torch_learns(pair, beta, temperature, checkpointing) -> None:
    """Compares the first gradient, and three updates with clipped gradients: losses, lengths, weights.

    Where a gradient is nearly 0, Adam divides noise by noise, so the weights are near but not equal.
    """
    descent = Descent(weight_decay=0.1, max_grad_norm=0.5)
    adapter, more = random_adapter(), {"kl_beta": beta, "temperature": temperature}
    ours = learner(pair, adapter, checkpointing, descent, **more)
    theirs = torch_learner(pair, adapter, descent, **more)
    assert ours.parameters == theirs.parameters
    rates = (1e-3, 2e-3, 3e-3)
    for rate in rates:
        mine, other = (each.accumulate(BATCH, WEIGHTS) for each in (ours, theirs))
        assert mine.tokens == other.tokens == 8
        assert (mine.loss, mine.entropy, mine.kl) == pytest.approx(
            (other.loss, other.entropy, other.kl), rel=1e-5, abs=2e-5
        )
        if rate == rates[0]:
            assert_same_gradient(ours, theirs)
        assert ours.update(rate) == pytest.approx(theirs.update(rate), rel=1e-3)
    found, wanted = ours.adapter(), theirs.adapter()
    assert found.pairs.keys() == wanted.pairs.keys()
    for name, pair_ in wanted.pairs.items():
        assert found.pairs[name].scale == pair_.scale
        np.testing.assert_allclose(found.pairs[name].a, pair_.a, atol=2e-4)
        np.testing.assert_allclose(found.pairs[name].b, pair_.b, atol=2e-4)
        assert np.abs(pair_.b - adapter.pairs[name].b).max() > 4e-3


def assert_same_gradient(ours: MLXEntropyLearner, theirs: TorchEntropyLearner) -> None:
    for name, layer in lora_layers(theirs.model).items():
        for part, wanted in (("lora_a", layer.a.grad), ("lora_b", layer.b.grad)):
            assert wanted is not None
            found, largest = np.array(ours._gradient[f"{name}.{part}"].T), float(wanted.abs().max())
            np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4 * max(1e-3, largest))


def test_layers_are_those_of_torch(pair) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair.folder)
    assert linear_layers(load(pair.folder)) == layers_of_torch(model)


def test_micro_batches_make_the_same_gradient(pair) -> None:
    whole, parts = (learner(pair, random_adapter(), kl_beta=1.0) for _ in range(2))
    together = whole.accumulate(BATCH, WEIGHTS)
    apart = [parts.accumulate([each], [w]) for each, w in zip(BATCH, WEIGHTS, strict=True)]
    assert sum(t.loss for t in apart) == pytest.approx(together.loss, abs=1e-5)
    assert whole.update(1e-3) == pytest.approx(parts.update(1e-3), rel=1e-4)


def test_a_gradient_that_was_forgotten_is_gone(pair) -> None:
    one, other = (learner(pair, random_adapter()) for _ in range(2))
    one.accumulate(BATCH, [5.0] * 3)
    one.forget()
    for each in (one, other):
        each.accumulate(BATCH, WEIGHTS)
    assert one.update(1e-3) == other.update(1e-3)


def test_a_step_lowers_the_entropy(pair) -> None:
    ours = learner(pair, new_adapter(linear_layers(load(pair.folder)), SETTINGS))
    entropies = []
    for _ in range(5):
        entropies.append(ours.accumulate(BATCH, [1 / 8] * 3).entropy)
        ours.update(1e-2)
    assert all(later < earlier for earlier, later in pairwise(entropies))


def test_a_gradient_that_is_no_number_changes_nothing(pair) -> None:
    ours = learner(pair, random_adapter())
    before = ours.state()
    ours.accumulate(BATCH, [float("nan")] * 3)
    assert np.isnan(ours.update(1e-3))
    for name, value in ours.state().items():
        assert np.array_equal(value, before[name]), name


def test_a_state_goes_on_bit_for_bit(pair) -> None:
    layers = linear_layers(load(pair.folder))
    one = learner(pair, new_adapter(layers, SETTINGS), kl_beta=1.5)
    fresh = one.state()
    for _ in range(3):
        one.accumulate(BATCH, [1 / 8] * 3)
        one.update(1e-3)
    state = one.state()
    two = learner(pair, new_adapter(layers, FineTuneSettings(rank=4, alpha=8, seed=7)), kl_beta=1.5)
    two.accumulate(BATCH, WEIGHTS)
    two.update(1e-3)
    two.restore(state)
    for each in (one, two):
        each.accumulate(BATCH, [1 / 8] * 3)
        each.update(1e-3)
    assert one.state().keys() == two.state().keys()
    for name, value in one.state().items():
        assert np.array_equal(value, two.state()[name]), name
    one.restore(fresh)
    assert one.state().keys() == fresh.keys()
    with pytest.raises(ValueError, match=r"q_proj\.lora_a is missing or has another shape"):
        one.restore({})


def test_a_quantized_model_learns_what_its_numbers_written_out_learn(pair) -> None:
    packed, plain = load(pair.folder), load(pair.folder)
    quantize(packed, group_size=32, bits=8)
    for name, layer in packed.named_modules():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
            weight = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=8)
            dict(plain.named_modules())[name].weight = weight
    learners = [
        MLXEntropyLearner(model, random_adapter(), Descent(), EntropyObjective(1.5, measures_kl=True))
        for model in (packed, plain)
    ]
    one, other = (each.accumulate(BATCH, WEIGHTS) for each in learners)
    assert (one.loss, one.kl) == pytest.approx((other.loss, other.kl), rel=1e-5)
    for name, gradient in learners[0]._gradient.items():
        wanted = np.array(learners[1]._gradient[name])
        np.testing.assert_allclose(np.array(gradient), wanted, atol=1e-4 * np.abs(wanted).max())


def test_what_is_out_of_memory() -> None:
    """Tests the messages in mlx/backend/metal/allocator.cpp and metal/eval.cpp."""
    for text, is_it in (
        ("[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum", True),
        ("[malloc] Unable to allocate 99 bytes.", True),
        ("[METAL] Command buffer execution failed: Insufficient Memory (00000008)", True),
        ("[matmul] Last dimension of first input with shape (2,3) must match", False),
    ):
        assert out_of_memory(RuntimeError(text)) is is_it


def test_an_adapter_put_and_taken_is_the_same(pair) -> None:
    ours = learner(pair, random_adapter(seed=1))
    other = random_adapter(seed=2)
    ours.put(other)
    for name, pair_ in ours.adapter().pairs.items():
        assert np.array_equal(pair_.a, other.pairs[name].a)
        assert np.array_equal(pair_.b, other.pairs[name].b)
    terms = ours.accumulate(BATCH, WEIGHTS)
    assert terms.loss == pytest.approx(learner(pair, other).accumulate(BATCH, WEIGHTS).loss, abs=1e-6)


def test_base_weights_are_those_without_an_adapter(pair) -> None:
    tokens = mx.array([[3, 4, 5, 6]])
    plain = np.array(load(pair.folder)(tokens))
    ours = learner(pair, random_adapter())
    with base_weights(ours.model):
        np.testing.assert_array_equal(np.array(ours.model(tokens)), plain)
    assert np.abs(np.array(ours.model(tokens)) - plain).max() > 0.1


def test_models_whose_logits_are_no_plain_product_are_refused(pair) -> None:
    model = load(pair.folder)
    model.model.norm.weight = model.model.norm.weight * 1.0
    original = type(model).__call__

    class Bent(type(model)):  # type: ignore[misc]
        def __call__(self, *arguments: Any, **more: Any) -> Any:
            return mx.tanh(original(self, *arguments, **more))

    model.__class__ = Bent
    with pytest.raises(ModelError, match="not the plain product"):
        MLXEntropyLearner(model, random_adapter(), Descent(), EntropyObjective())
