"""Keys and values by slots, with the interface that mlx-lm's models expect of their caches.

There is one slot for each sequence of the contract. A layer's keys are one array [slots, kv_heads, capacity +
1, head_dim], its values another. Rows of a forward pass are a range of slots, each with its own length:
rotary positions start at each row's own offset, and a mask says which cells a token sees. mlx-lm's
BatchKVCache aligns rows on the right instead, which moves every row's cells whenever rows come or go.

Cells at and beyond a sequence's length are zero. The last cell of a slot, which is never read, takes what
padding and rows that only fill a gap would write.

`Decoder` runs forward passes of an mlx-lm model over chunks of several sequences. mlx-lm's own BatchGenerator
draws with one global random state, gives no statistics, and decides itself when rows come and go. So the
model and the cache are driven directly.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from emlocal.backends.mlx.model import windows
from emlocal.backends.slots import Chunk, SlotCache
from emlocal.errors import CancelledError, ModelError

LAYERS_BETWEEN = 4
"""Layers of a long pass that are computed between two checks for cancellation."""


@dataclass(frozen=True)
class Window:
    """The cells that one forward pass reads and writes."""

    slots: range
    cells: mx.array | None
    """The cell of each token, int32 [B, T]; the slot's last cell for tokens that are not kept.

    None if all rows write the cells from `length` − T on.
    """
    offsets: mx.array | int
    """The position of each row's first token, int32 [B]; one number if all are the same."""
    positions: mx.array
    """The position of each token, int32 [B, T]."""
    length: int
    """Number of cells to read."""
    cancelled: Callable[[], bool] | None
    """Called every few layers; None: never."""


class MLXCache(SlotCache):
    """All layers' keys and values. `layers` is the object that a model takes as its cache."""

    def __init__(self, reach: Sequence[int | None]) -> None:
        """Makes an empty cache. `reach`: how many cells back each layer sees; None: all."""
        self.layers = [Layer(self, i, size) for i, size in enumerate(reach)]
        self.window: Window | None = None

    def begin(self, window: Window) -> None:
        """Sets what the next pass reads and writes."""
        self.window = window

    @property
    def arrays(self) -> list[mx.array]:
        """The arrays of the layers that have stored something."""
        return [array for layer in self.layers for array in layer.held()]

    def _grow(self, slots: int, tokens: int) -> None:
        for layer in self.layers:
            layer.grow(slots, tokens)

    def _shrink(self) -> None:
        for layer in self.layers:
            layer.shrink(self.slots, self.capacity)

    def copy(self, source: int, target: int, length: int) -> None:
        for layer in self.layers:
            layer.copy(source, target, length)
        mx.eval(self.arrays)

    def clear(self, slot: int, start: int, stop: int) -> None:
        stop = min(stop, self.capacity)
        if slot < self.slots and start < stop:
            for layer in self.layers:
                layer.clear(slot, start, stop)
            mx.eval(self.arrays)

    def drop(self) -> None:
        for layer in self.layers:
            layer.drop()
        self.slots, self.capacity, self.window = 0, 0, None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


class Layer:
    """One layer's part, with the methods that mlx-lm's models call."""

    def __init__(self, owner: MLXCache, index: int, reach: int | None) -> None:
        self._owner = owner
        self._index = index
        self._reach = reach
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @property
    def offset(self) -> mx.array | int:
        """The position of each row's first token in this pass."""
        return self._window.offsets

    @property
    def _window(self) -> Window:
        assert self._owner.window is not None
        return self._owner.window

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stores new keys and values, [B, kv_heads, T, head_dim].

        Returns all keys and values up to the window's length. Raises CancelledError.
        """
        window, owner = self._window, self._owner
        if window.cancelled is not None and self._index % LAYERS_BETWEEN == 0:
            mx.eval(keys, values)  # computes the layers before this one, which MLX does not do earlier
            if window.cancelled():
                raise CancelledError
        if self._keys is None or self._values is None:  # in the first pass: the shapes are not known before
            self._keys = _zeros(keys, owner.slots, owner.capacity)
            self._values = _zeros(values, owner.slots, owner.capacity)
        self._keys, seen_keys = _store(self._keys, keys, window)
        self._values, seen_values = _store(self._values, values, window)
        return seen_keys, seen_values

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Returns which cells each token sees, bool [B, 1, T, length].

        None or "causal" if they mean the same: attention has quicker kernels for these.
        """
        window = self._window
        reach = window_size or self._reach
        if window.cells is None and (reach is None or reach >= window.length) and not return_array:
            return None if N == 1 else "causal"
        here = window.positions[:, None, :, None]
        cells = mx.arange(window.length)
        seen = cells <= here
        return seen if reach is None else seen & (cells > here - reach)

    def held(self) -> Iterator[mx.array]:
        """Yields keys and values, once there are some."""
        if self._keys is not None and self._values is not None:
            yield self._keys
            yield self._values

    def grow(self, slots: int, tokens: int) -> None:
        """Moves the contents into stores of this many slots and tokens."""
        if self._keys is not None and self._values is not None:
            self._keys = _grown(self._keys, slots, tokens)
            self._values = _grown(self._values, slots, tokens)

    def shrink(self, slots: int, tokens: int) -> None:
        """Cuts the stores back to this many slots and tokens, and the spare cell."""
        if self._keys is not None and self._values is not None:
            self._keys = self._keys[:slots, :, : tokens + 1]
            self._values = self._values[:slots, :, : tokens + 1]

    def copy(self, source: int, target: int, length: int) -> None:
        for array in self.held():
            array[target, :, :length] = array[source, :, :length]

    def clear(self, slot: int, start: int, stop: int) -> None:
        for array in self.held():
            array[slot, :, start:stop] = 0

    def drop(self) -> None:
        self._keys = self._values = None


def _zeros(like: mx.array, slots: int, tokens: int) -> mx.array:
    """Returns an empty store for states with these heads and dimensions, with one spare cell per slot."""
    return mx.zeros((slots, like.shape[1], tokens + 1, like.shape[3]), like.dtype)


def _grown(old: mx.array, slots: int, tokens: int) -> mx.array:
    new, held = _zeros(old, slots, tokens), old.shape[2] - 1
    new[: old.shape[0], :, :held] = old[:, :, :held]
    mx.eval(new)
    return new


def _store(store: mx.array, new: mx.array, window: Window) -> tuple[mx.array, mx.array]:
    """Writes [B, kv_heads, T, head_dim] into its cells; returns the store, and its part for attention."""
    low, high, width = window.slots.start, window.slots.stop, new.shape[2]
    if window.cells is None:
        store[low:high, :, window.length - width : window.length] = new
    else:
        rows = mx.arange(low, high)[:, None]
        store[rows, :, window.cells] = new.transpose(0, 2, 1, 3)
    return store, store[low:high, :, : window.length]


_UNLIKE = 0.3
"""Limit in standard deviations of the logits. Rounding in bfloat16 makes 0.1, another computation over 1."""
GAP = 2
"""Decoding also computes gaps between slots, each up to this many times the rows asked for."""


class Decoder:
    """A causal language model and the cache that it reads and writes.

    Raises ModelError for a model that keeps its state elsewhere than in a cache of keys and values.
    """

    def __init__(self, model: Module) -> None:
        self._model: Any = model  # mlx-lm's models have no static types
        self.reach = windows(model)
        self.cache = MLXCache(self.reach)

    def read(self, chunks: Sequence[Chunk], cancelled: Callable[[], bool]) -> None:
        """Computes the chunks, of different slots in ascending order, and stores their keys and values.

        Raises CancelledError.
        """
        for rows in _ranges(chunks):
            self._run(rows, cancelled)
            mx.eval(self.cache.arrays)

    def step(self, chunks: Sequence[Chunk]) -> mx.array:
        """Computes one token per slot, and returns the logits after it, float32 [chunks, V], computed."""
        parts = []
        for rows in _ranges(chunks):
            asked = [i for i, chunk in enumerate(rows) if chunk.tokens]  # the others only fill a gap
            logits = self._run(rows, None)[:, -1]
            parts.append(logits if len(asked) == len(rows) else logits[mx.array(asked)])
        found = (parts[0] if len(parts) == 1 else mx.concatenate(parts)).astype(mx.float32)
        mx.eval(found, self.cache.arrays)
        return found

    def _run(self, rows: Sequence[Chunk], cancelled: Callable[[], bool] | None) -> mx.array:
        """Returns [rows, T, V], not computed yet. The rows' slots follow in order.

        Padding is on the right, at the positions that follow, so that it sees some cells; it is not kept.
        """
        width = max(len(chunk.tokens) for chunk in rows)
        length = max(chunk.stop for chunk in rows)
        whole = all(chunk.stop == length and len(chunk.tokens) == width for chunk in rows)
        starts = np.array([chunk.start for chunk in rows], dtype=np.int32)
        ids = np.zeros((len(rows), width), dtype=np.int32)
        cells = np.full((len(rows), width), self.cache.capacity, dtype=np.int32)
        for i, chunk in enumerate(rows):
            ids[i, : len(chunk.tokens)] = chunk.tokens
            cells[i, : len(chunk.tokens)] = range(chunk.start, chunk.stop)
        window = Window(
            slots=range(rows[0].slot, rows[-1].slot + 1),
            cells=None if whole else mx.array(cells),
            offsets=int(starts[0]) if whole else mx.array(starts),
            positions=mx.array(starts[:, None] + np.arange(width, dtype=np.int32)),
            length=length,
            cancelled=cancelled,
        )
        self.cache.begin(window)
        logits: mx.array = self._model(mx.array(ids), cache=self.cache.layers)
        return logits

    def check(self) -> None:
        """Compares logits with the cache, in rows of different lengths, and without it, on five tokens.

        Raises ModelError if the logits differ, or if layers did not use the cache.
        """
        name = type(self._model).__module__.rpartition(".")[2]
        tokens = list(range(5))
        expected = self._model(mx.array([tokens]))[0, -1].astype(mx.float32)
        self.cache.reserve(2, len(tokens), len(tokens))
        self.read([Chunk(0, 0, tokens[:2], False), Chunk(1, 0, tokens[:3], False)], lambda: False)
        self.read([Chunk(0, 2, tokens[2:4], False)], lambda: False)
        got = self.step([Chunk(0, 4, tokens[4:], True), Chunk(1, 3, tokens[3:4], True)])[0]
        held, layers = len(self.cache.arrays), 2 * len(self.reach)
        self.cache.clear(0, 0, len(tokens))
        self.cache.clear(1, 0, len(tokens))
        if held != layers:
            raise ModelError(
                f"{name} does not run on the mlx engine: only {held // 2} of its {layers // 2}"
                " layers keep keys"
                " and values"
            )
        far = float(mx.sqrt(mx.mean(mx.square(got - expected))) / mx.std(expected))
        if not far < _UNLIKE:
            raise ModelError(
                f"{name} does not run on the mlx engine: token by token its logits are off by {far:.2g}"
                " standard deviations"
            )


def _ranges(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Returns runs of slots in order, each for a pass of its own.

    Small gaps between single tokens are filled. An unneeded row costs less than another pass over the
    weights; it writes nothing that is read.
    """
    single = all(len(chunk.tokens) == 1 for chunk in chunks)
    runs: list[list[Chunk]] = []
    for chunk in chunks:
        gap = chunk.slot - runs[-1][-1].slot - 1 if runs else -1
        if runs and (gap == 0 or (single and gap <= GAP * len(chunks))):
            last = runs[-1][-1].slot
            runs[-1] += [Chunk(slot, 0, (), False) for slot in range(last + 1, chunk.slot)]
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return runs
