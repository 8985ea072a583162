"""The EM-FT loss on MLX, and its gradient by the hidden states, a few rows of logits at a time.

As in the torch engine (backends/torch/objective.py): the head is frozen under LoRA, so a chunk's gradient is
formed while its logits are there, and [tokens, V] never is. The equations are those of `emlocal.em.em_ft`,
which this is tested against.
"""

from typing import NamedTuple

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.quantized import QuantizedEmbedding, QuantizedLinear

CHUNK_BYTES = 40 << 20
"""Of one float32 buffer of logits. MLX allocates ahead of what it computes: there are up to sixteen."""


class Head:
    """The weights that turn hidden states into logits: a linear layer's, or the embeddings'.

    Logits and what is computed of them are float32 whatever the model is; a bfloat16 row's entropy is off by
    percents. So weights that are not quantized are held in float32 once more.
    """

    def __init__(self, layer: Module) -> None:
        """Raises TypeError for a layer with a bias."""
        if "bias" in layer:
            raise TypeError("the head has a bias")
        self._layer = layer
        self._quantized = isinstance(layer, QuantizedEmbedding | QuantizedLinear)
        self._weight: mx.array = layer["weight"] if self._quantized else layer["weight"].astype(mx.float32)
        self.vocabulary = int(self._weight.shape[0])
        mx.eval(self._weight)

    def logits(self, hidden: mx.array) -> mx.array:
        """[rows, H] → float32 [rows, V]."""
        return self._product(hidden.astype(mx.float32), transpose=True)

    def pull_back(self, gradient: mx.array) -> mx.array:
        """By the logits, float32 [rows, V] → by the hidden states, float32 [rows, H]."""
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
    """What a batch of positions costs. Not computed before it is asked for."""

    entropy: mx.array
    """[M] float32, nats."""
    kl: mx.array
    """[M] float32, nats; zeros without a base."""
    gradient: mx.array
    """[M, H] float32: of Σ weight · (H + β·KL) by the hidden states."""


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
    """Of Σ_m weight_m · (H(p_m) + β·KL(p_m ‖ p⁰_m)), p = softmax(head · hidden / temperature).

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
        if done:  # else MLX might compute the logits of several chunks before it is through with one
            part = mx.depends(part, done[-1].gradient)
        base = None
        if base_hidden is not None:
            base = head.logits(mx.depends(base_hidden[start : start + rows], part)) / temperature
        entropy, kl, slope = _chunk(head.logits(part) / temperature, base, beta)
        scale = weights[start : start + rows, None] / temperature
        done.append(Terms(entropy, kl, head.pull_back(slope) * scale))
    return Terms(*(mx.concatenate(list(each)) for each in zip(*done, strict=True)))


def _chunk(z: mx.array, base: mx.array | None, beta: float) -> tuple[mx.array, mx.array, mx.array]:
    """Entropy [rows], KL [rows] and ∂(H + β·KL)/∂z [rows, V]."""
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
