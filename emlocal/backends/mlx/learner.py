"""EM-FT on MLX: mlx-lm's LoRA layers on a frozen model, MLX's AdamW, and the loss in chunks.

The loss and its gradient with respect to the hidden states are computed for a few rows of logits at a time.
As in the torch engine (backends/torch/policy.py), the head is frozen under LoRA. So a chunk's gradient is
formed while its logits exist, and [tokens, V] never exists as a whole. The equations are those of
`emlocal.em.losses`, which this is tested against.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear
from mlx.nn.utils import value_and_grad
from mlx.optimizers import AdamW, clip_grad_norm
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from emlocal.backends.learner import (
    Answer,
    Descent,
    EntropyLearner,
    EntropyObjective,
    EntropyTerms,
    OutOfMemoryError,
    Processes,
    State,
    padded,
)
from emlocal.backends.mlx.model import attach, base_weights, lora_layers, out_of_memory
from emlocal.errors import ModelError
from emlocal.machine import peak_memory
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.models.memory import available

CHUNK_BYTES = 40 << 20
"""Bytes of one float32 buffer of logits. MLX allocates ahead of its computation: there are up to sixteen."""


class Head:
    """The weights that turn hidden states into logits: a linear layer's, or the embeddings'.

    Logits and the numbers computed from them are float32 in every model, because a bfloat16 row's entropy is
    off by some per cent. So weights that are not quantized are held once more, in float32.
    """

    def __init__(self, layer: Module) -> None:
        """Takes the layer's weights. Raises TypeError for a layer with a bias."""
        if "bias" in layer:
            raise TypeError("the head has a bias")
        self._layer = layer
        self._quantized = isinstance(layer, QuantizedEmbedding | QuantizedLinear)
        self._weight: mx.array = layer["weight"] if self._quantized else layer["weight"].astype(mx.float32)
        self.vocabulary = int(self._weight.shape[0])
        mx.eval(self._weight)

    def logits(self, hidden: mx.array) -> mx.array:
        """Returns the logits: [rows, H] → float32 [rows, V]."""
        return self._product(hidden.astype(mx.float32), transpose=True)

    def pull_back(self, gradient: mx.array) -> mx.array:
        """Turns a gradient by the logits, [rows, V], into one by the hidden states, [rows, H]; float32."""
        return self._product(gradient, transpose=False)

    def _product(self, x: mx.array, *, transpose: bool) -> mx.array:
        if not self._quantized:
            return x @ (self._weight.T if transpose else self._weight)
        layer = self._layer
        scales, biases = layer["scales"], layer.get("biases")
        if mx.issubdtype(scales.dtype, mx.floating):
            scales = scales.astype(mx.float32)
            biases = None if biases is None else biases.astype(mx.float32)
        return mx.quantized_matmul(
            x,
            self._weight,
            scales,
            biases,
            transpose=transpose,
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        )


class Terms(NamedTuple):
    """The loss of a batch of positions, in parts. MLX computes them when they are needed."""

    entropy: mx.array
    """[M] float32, nats."""
    kl: mx.array
    """[M] float32, nats; zeros without a base."""
    gradient: mx.array
    """[M, H] float32: gradient of Σ weight · (H + β·KL) with respect to the hidden states."""


def em_ft_terms(
    hidden: mx.array,
    head: Head,
    weights: mx.array,
    *,
    base_hidden: mx.array | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Terms:
    """Returns the terms of Σ_m weight_m · (H(p_m) + β·KL(p_m ‖ p⁰_m)).

    p is softmax(head · hidden / temperature).

    Args:
        hidden: [M, H], the states that the head reads, any float dtype.
        weights: [M] float32, of each position in the sum.
        base_hidden: [M, H], the same positions' states without the adapter; needed for the KL.
        chunk_bytes: the size of a buffer of logits, which decides how many rows are taken at a time.
    """
    if beta and base_hidden is None:
        raise ValueError("the KL term needs the hidden states of the base model")
    rows = max(1, chunk_bytes // (4 * head.vocabulary))
    done: list[Terms] = []
    for start in range(0, hidden.shape[0], rows):
        part = hidden[start : start + rows]
        if done:  # otherwise MLX might compute the logits of several chunks before it finishes one
            part = mx.depends(part, done[-1].gradient)
        base = None
        if base_hidden is not None:
            base = head.logits(mx.depends(base_hidden[start : start + rows], part)) / temperature
        entropy, kl, slope = _chunk(head.logits(part) / temperature, base, beta)
        scale = weights[start : start + rows, None] / temperature
        done.append(Terms(entropy, kl, head.pull_back(slope) * scale))
    return Terms(*(mx.concatenate(list(each)) for each in zip(*done, strict=True)))


def _chunk(z: mx.array, base: mx.array | None, beta: float) -> tuple[mx.array, mx.array, mx.array]:
    """Returns entropy [rows], KL [rows] and ∂(H + β·KL)/∂z [rows, V]."""
    z = z - z.max(axis=1, keepdims=True)
    e = mx.exp(z)
    total = e.sum(axis=1, keepdims=True)
    log_total = mx.log(total)
    mean = (e * z).sum(axis=1, keepdims=True) / total  # E[z], so H = log Σe − E[z]
    entropy = (log_total - mean)[:, 0]
    if base is None:
        return entropy, mx.zeros_like(entropy), (mean - z) * e / total  # −p (log p + H) = −p (z − E[z])
    base = base - base.max(axis=1, keepdims=True)
    mean_base = (e * base).sum(axis=1, keepdims=True) / total
    kl = (mean - log_total) - (mean_base - mx.logsumexp(base, axis=1, keepdims=True))
    # p ((β−1)(z − E[z]) − β (z⁰ − E[z⁰])): the constants of the logarithms cancel
    slope = ((beta - 1) * (z - mean) - beta * (base - mean_base)) * e / total
    return entropy, kl[:, 0], slope


BETAS, EPSILON = (0.9, 0.999), 1e-8  # Kingma & Ba 2015; Loshchilov & Hutter 2019
Arrays = dict[str, mx.array]


class MLXEntropyLearner(EntropyLearner):
    """A learner that trains a LoRA adapter on an mlx-lm model by EM-FT.

    The model is frozen and keeps the adapter attached. A and B are float32 in every model, so that small
    optimizer steps are not rounded away.
    """

    def __init__(
        self,
        model: Module,
        adapter: Adapter,
        descent: Descent,
        objective: EntropyObjective,
        *,
        checkpointing: bool = False,
    ) -> None:
        """Attaches the adapter. `checkpointing`: compute activations twice instead of keeping them.

        Raises ModelError for a model whose logits are not a plain product of hidden states and head.
        """
        self.processes = Processes()
        self.model = model
        self._base_model = adapter.base_model
        self._descent = descent
        self._objective = objective
        self._checkpointing = checkpointing
        self._body: Any = model["model"]
        self._head = _head(model, self._body)
        attach(model, adapter, 1.0, mx.float32, "the model")
        self._layers = lora_layers(model)
        model.freeze()
        for layer in self._layers.values():
            layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        self.parameters = sum(array.size for array in self._arrays().values())
        self._optimizer = self._new_optimizer()
        self._gradient: Arrays = {}
        # near this limit, MLX waits until it can free memory
        mx.set_memory_limit(mx.get_active_memory() + available())

    def accumulate(self, batch: Sequence[Answer], weights: Sequence[float]) -> EntropyTerms:
        tokens, predicts = padded(batch)
        lengths = [len(each.answer) for each in batch]
        ids, places = mx.array(tokens.astype(np.int32)), mx.array(np.flatnonzero(predicts).astype(np.int32))
        of_each = mx.array(np.repeat(np.array(weights, np.float32), lengths))
        try:
            base = self._base_states(ids, places) if self._objective.measures_kl else None
            with _checkpointing(self.model if self._checkpointing else None):
                follow = value_and_grad(self.model, self._loss)
                (_, sums), gradient = follow(ids, places, of_each, base)
            found: Arrays = tree_flatten(gradient, destination={})  # type: ignore[assignment]
            held = self._gradient
            self._gradient = {name: held[name] + g if held else g for name, g in found.items()}
            mx.eval(self._gradient, sums)
        except RuntimeError as error:  # MLX has no more specific error
            if out_of_memory(error):
                raise OutOfMemoryError from error
            raise
        return EntropyTerms(sum(lengths), *sums.tolist())

    def _loss(
        self, ids: mx.array, places: mx.array, weights: mx.array, base: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Returns a number whose gradient is the loss's, and the sums of loss, entropy and KL, [3].

        The gradient by the hidden states is known; autograd computes the rest, through their product.
        """
        states = self._states(ids, places)
        objective = self._objective
        terms = em_ft_terms(
            mx.stop_gradient(states),
            self._head,
            weights,
            base_hidden=base,
            beta=objective.kl_beta,
            temperature=objective.temperature,
        )
        loss = (weights * (terms.entropy + objective.kl_beta * terms.kl)).sum()
        sums = mx.stack([loss, terms.entropy.sum(), terms.kl.sum()])
        return (states * mx.stop_gradient(terms.gradient).astype(states.dtype)).sum(), sums

    def _states(self, ids: mx.array, places: mx.array) -> mx.array:
        """Returns the hidden states at these places of the rectangle, counted row by row: [M, H].

        Rows are padded on the right, where causal attention does not look, so they need no mask.
        """
        states: mx.array = self._body(ids)
        return states.reshape(-1, states.shape[-1])[places]

    def _base_states(self, ids: mx.array, places: mx.array) -> mx.array:
        """Returns the hidden states of the model without its adapter."""
        with base_weights(self.model):
            states = self._states(ids, places)
            mx.eval(states)
        return states

    def forget(self) -> None:
        self._gradient = {}
        mx.clear_cache()

    def update(self, learning_rate: float) -> float:
        clipped, length = clip_grad_norm(self._gradient, self._descent.max_grad_norm)
        norm = float(length)
        if math.isfinite(norm):
            self._optimizer.learning_rate = learning_rate
            self._set(self._optimizer.apply_gradients(clipped, self._arrays()))
            mx.eval(self._arrays(), self._optimizer.state)
        self.forget()
        return norm

    def adapter(self) -> Adapter:
        return Adapter(
            {
                name: LoraPair(_numbers(layer.lora_a.T), _numbers(layer.lora_b.T), layer.scale)
                for name, layer in self._layers.items()
            },
            self._base_model,
        )

    def put(self, adapter: Adapter) -> None:
        for name, layer in self._layers.items():
            layer.lora_a = mx.array(adapter.pairs[name].a.T)
            layer.lora_b = mx.array(adapter.pairs[name].b.T)
        mx.eval(self._arrays())

    def peak_memory(self) -> int:
        return mx.get_peak_memory() if mx.default_device().type == mx.gpu else peak_memory()

    def state(self) -> State:
        state = {name: _numbers(array) for name, array in self._arrays().items()}
        moments: dict[str, Any] = self._optimizer.state
        for name in self._arrays():
            if name in moments:
                state[f"{name}.mean"] = _numbers(moments[name]["m"])
                state[f"{name}.square"] = _numbers(moments[name]["v"])
        return {**state, "steps": np.array(moments["step"])}

    def restore(self, state: State) -> None:
        arrays = self._arrays()
        for name, array in arrays.items():
            if name not in state or state[name].shape != tuple(array.shape):
                raise ValueError(f"{name} is missing or has another shape")
        self._set({name: mx.array(state[name]) for name in arrays})
        self._optimizer = self._new_optimizer()
        if f"{next(iter(arrays))}.mean" in state:
            self._optimizer.init(arrays)
            for name in arrays:
                self._optimizer.state[name] = {
                    "m": mx.array(state[f"{name}.mean"]),
                    "v": mx.array(state[f"{name}.square"]),
                }
            self._optimizer.state["step"] = mx.array(state["steps"])
        mx.eval(self._arrays(), self._optimizer.state)

    def _new_optimizer(self) -> AdamW:
        return AdamW(
            0.0,
            betas=list(BETAS),
            eps=EPSILON,
            weight_decay=self._descent.weight_decay,
            bias_correction=True,
        )

    def _arrays(self) -> Arrays:
        """Returns the trained arrays, by the names that gradients have: A as [in, rank], B as [rank, out]."""
        found: Arrays = {}
        for name, layer in self._layers.items():
            found |= {f"{name}.lora_a": layer.lora_a, f"{name}.lora_b": layer.lora_b}
        return found

    def _set(self, arrays: Arrays) -> None:
        for name, layer in self._layers.items():
            layer.lora_a, layer.lora_b = arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"]


def _head(model: Module, body: Any) -> Head:
    """Returns the model's head.

    Raises ModelError if the logits are not its plain product: some models scale or bend them.
    """
    layer = model["lm_head"] if "lm_head" in model else body["embed_tokens"]
    if isinstance(layer, LoRALinear):
        raise ModelError("EM-FT cannot train this model: its head has an adapter")
    try:
        head = Head(layer)
    except TypeError:
        raise ModelError("EM-FT cannot train this model: its head has a bias") from None
    untyped: Any = model
    tokens = mx.arange(min(4, head.vocabulary))[None]
    logits = untyped(tokens).astype(mx.float32)[0]
    if float(mx.abs(logits - head.logits(body(tokens)[0])).max()) > 0.02 * float(mx.abs(logits).max()):
        raise ModelError("EM-FT cannot train this model: its logits are not the plain product of its head")
    return head


@contextmanager
def _checkpointing(model: Module | None) -> Iterator[None]:
    """Makes the model's layers compute their activations twice within this block; None: no model.

    mlx-lm's `grad_checkpoint` changes a class for good, which would make answering slower.
    """
    untyped: Any = model
    kinds = {type(layer) for layer in untyped.layers} if model is not None else set()
    before = {kind: kind.__call__ for kind in kinds}
    for kind, call in before.items():
        kind.__call__ = _recomputed(call)
    try:
        yield
    finally:
        for kind, call in before.items():
            kind.__call__ = call


def _recomputed(call: Any) -> Any:
    """Returns a layer's __call__ that keeps its inputs only, and recomputes the rest for the gradient."""

    def run(layer: Module, *arguments: Any, **more: Any) -> Any:
        def inner(parameters: Any, *arguments: Any, **more: Any) -> Any:
            layer.update(parameters)
            return call(layer, *arguments, **more)

        return mx.checkpoint(inner)(layer.trainable_parameters(), *arguments, **more)

    return run


def _numbers(array: mx.array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Returns a copy on the host."""
    return np.array(array, dtype=np.float32, order="C")
