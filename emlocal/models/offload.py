"""How many layers of a model fit on GPUs: arithmetic on sizes in bytes, without a GPU.

llama.cpp counts the output (the last norm and the matrix to the vocabulary) as one more layer, after the
others. It puts the last N of these on GPUs, in the GPUs' order, each with its keys and values. The embedding
stays in main memory (src/llama-model.cpp of llama-cpp-python 0.3.36, `load_tensors`).
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil

from emlocal.models.header import ModelHeader, Tensor

SPARE_BYTES = 1 << 30
"""Left free on each GPU for its driver's context and buffers, as llama.cpp's own `--fit` leaves it."""
_LAYER = re.compile(r"blk\.(\d+)\.")
_OUTPUT = ("output.weight", "output.bias", "output_norm.weight", "output_norm.bias")
_TABLE = "token_embd.weight"


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model's parts, in bytes."""

    layers: tuple[int, ...]
    """Weights of each layer, the output's last."""
    cache: tuple[int, ...]
    """Keys and values of each layer for the whole context; the output has none."""

    def __post_init__(self) -> None:
        assert len(self.layers) == len(self.cache)

    def of_last(self, count: int) -> int:
        """Returns the bytes of the last `count` layers."""
        first = len(self.layers) - count
        return sum(self.layers[first:]) + sum(self.cache[first:])


@dataclass(frozen=True)
class Offload:
    """How many layers go to GPUs, and to which."""

    counts: tuple[int, ...]
    """Layers of each GPU, in the GPUs' order."""
    held: tuple[int, ...]
    """Bytes that each GPU holds."""

    @property
    def layers(self) -> int:
        """Layers on GPUs, with the output as one."""
        return sum(self.counts)


def sizes_of(header: ModelHeader, tensors: Sequence[tuple[str, Tensor]], tokens: int, each: float) -> Sizes:
    """Returns the sizes of a GGUF model's parts, with a cache for `tokens` tokens.

    Args:
        tensors: the names and tensors of the file.
        tokens: of all sequences together.
        each: bytes of one number in the cache.
    """
    weights = [0] * (header.block_count + 1)
    for name, tensor in tensors:
        found = _LAYER.match(name)
        if found and int(found[1]) < header.block_count:
            weights[int(found[1])] += tensor.nbytes
        elif name in _OUTPUT:
            weights[-1] += tensor.nbytes
    names = dict(tensors)
    if "output.weight" not in names and _TABLE in names:
        weights[-1] += names[_TABLE].nbytes  # a second copy, on the GPU
    numbers = header.key_length + header.value_length
    heads = (*header.cached_heads, *[0] * header.block_count)[: header.block_count]
    return Sizes(tuple(weights), (*(ceil(tokens * n * numbers * each) for n in heads), 0))


def even_sizes(weights: int, layers: int, cache: int) -> Sizes:
    """Returns sizes for a model of which only sums are known: all layers alike, the output as one of them."""
    each = ceil(weights / (layers + 1))
    return Sizes((each,) * (layers + 1), (*[ceil(cache / layers)] * layers, 0))


def plan(sizes: Sizes, free: Sequence[int], shares: Sequence[float] = ()) -> Offload:
    """Returns the most layers that fit.

    Args:
        free: bytes that each GPU may take, without what must stay free.
        shares: the proportions in which layers are divided among GPUs. Without them the first GPU is filled
            first, then the next.
    """
    for count in range(len(sizes.layers), 0, -1):
        counts = _divided(count, shares) if shares else _filled(sizes, count, free)
        found = placed(sizes, counts)
        if found.layers == count and all(h <= f for h, f in zip(found.held, free, strict=True)):
            return found
    return placed(sizes, (0,) * len(free))


def placed(sizes: Sizes, counts: Sequence[int]) -> Offload:
    """Returns what GPUs hold that have these numbers of the last layers."""
    first = len(sizes.layers) - sum(counts)
    held = []
    for count in counts:
        held.append(sum(sizes.layers[first : first + count]) + sum(sizes.cache[first : first + count]))
        first += count
    return Offload(tuple(counts), tuple(held))


def divided(sizes: Sizes, count: int, shares: Sequence[float]) -> Offload:
    """Returns what GPUs hold if llama.cpp divides the last `count` layers among them by `shares`."""
    return placed(sizes, _divided(min(count, len(sizes.layers)), shares))


def _filled(sizes: Sizes, count: int, free: Sequence[int]) -> tuple[int, ...]:
    """Returns how many of the last `count` layers each GPU takes if each is filled before the next."""
    first, last = len(sizes.layers) - count, len(sizes.layers)
    counts = []
    for room in free:
        taken = 0
        for need in _needs(sizes, first, last):
            if need > room:
                break
            room, taken = room - need, taken + 1
        counts.append(taken)
        first += taken
    return tuple(counts)


def _needs(sizes: Sizes, first: int, last: int) -> Iterator[int]:
    return (sizes.layers[i] + sizes.cache[i] for i in range(first, last))


def _divided(count: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Returns llama.cpp's division of `count` layers: layer i to the first GPU whose sum of shares exceeds
    i / count."""
    total = sum(shares)
    ends = [end / total for end in accumulate(shares)]
    counts = [0] * len(shares)
    for layer in range(count):
        counts[min(bisect_right(ends, layer / count), len(shares) - 1)] += 1
    return tuple(counts)
