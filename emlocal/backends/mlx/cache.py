"""Keys and values by slots, behind the interface that mlx-lm's models expect of their caches.

One slot for each sequence of the contract. A layer's keys are one array [slots, kv_heads, capacity + 1,
head_dim], its values another. Rows of a forward pass are a range of slots, each with its own length: rotary
positions start at each row's own offset, and a mask says which cells a token sees. mlx-lm's BatchKVCache
aligns rows on the right instead, which moves every row's cells whenever rows come or go.

Cells at and beyond a sequence's length are zero. The last cell of a slot, never read, takes what padding and
rows that only fill a gap would write.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from emlocal.backends.slots import SlotCache
from emlocal.errors import CancelledError

LAYERS_BETWEEN = 4
"""Layers of a long pass that are computed before somebody is asked whether to go on."""


@dataclass(frozen=True)
class Window:
    """What one forward pass reads and writes."""

    slots: range
    cells: mx.array | None
    """Where each token is written, int32 [B, T]; the slot's last cell for those that are not kept. None where
    all rows write the cells from `length` − T on."""
    offsets: mx.array | int
    """The position of each row's first token, int32 [B]; one number where it is the same."""
    positions: mx.array
    """Of each token, int32 [B, T]."""
    length: int
    """Cells to be read."""
    cancelled: Callable[[], bool] | None
    """Asked every few layers; None: not at all."""


class MLXCache(SlotCache):
    """All layers' keys and values. `layers` is what a model takes as its cache."""

    def __init__(self, reach: Sequence[int | None]) -> None:
        """`reach`: how many cells back each layer sees; None: all."""
        self.layers = [Layer(self, i, size) for i, size in enumerate(reach)]
        self.window: Window | None = None

    def begin(self, window: Window) -> None:
        """Say what the next pass reads and writes."""
        self.window = window

    @property
    def arrays(self) -> list[mx.array]:
        """What is held, of the layers that have stored something."""
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
        """Store new keys and values, [B, kv_heads, T, head_dim]; all up to the window's length.

        Raises CancelledError.
        """
        window, owner = self._window, self._owner
        if window.cancelled is not None and self._index % LAYERS_BETWEEN == 0:
            mx.eval(keys, values)  # the layers before this one; nothing is computed earlier than that
            if window.cancelled():
                raise CancelledError
        if self._keys is None or self._values is None:  # the first pass: only now are the shapes known
            self._keys = _zeros(keys, owner.slots, owner.capacity)
            self._values = _zeros(values, owner.slots, owner.capacity)
        self._keys, seen_keys = _store(self._keys, keys, window)
        self._values, seen_values = _store(self._values, values, window)
        return seen_keys, seen_values

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Which cells each token sees, bool [B, 1, T, length].

        None or "causal" where that says the same: attention has quicker kernels for these.
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
        """Keys and values, once there are some."""
        if self._keys is not None and self._values is not None:
            yield self._keys
            yield self._values

    def grow(self, slots: int, tokens: int) -> None:
        """Move what is held into stores of so many slots and tokens."""
        if self._keys is not None and self._values is not None:
            self._keys = _grown(self._keys, slots, tokens)
            self._values = _grown(self._values, slots, tokens)

    def shrink(self, slots: int, tokens: int) -> None:
        """Back to so many slots and tokens and the spare cell."""
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
    """An empty store for states with these heads and dimensions, of so many tokens and the spare cell."""
    return mx.zeros((slots, like.shape[1], tokens + 1, like.shape[3]), like.dtype)


def _grown(old: mx.array, slots: int, tokens: int) -> mx.array:
    new, held = _zeros(old, slots, tokens), old.shape[2] - 1
    new[: old.shape[0], :, :held] = old[:, :, :held]
    mx.eval(new)
    return new


def _store(store: mx.array, new: mx.array, window: Window) -> tuple[mx.array, mx.array]:
    """Write [B, kv_heads, T, head_dim] where it belongs; the store, and all of it that attention reads."""
    low, high, width = window.slots.start, window.slots.stop, new.shape[2]
    if window.cells is None:
        store[low:high, :, window.length - width : window.length] = new
    else:
        rows = mx.arange(low, high)[:, None]
        store[rows, :, window.cells] = new.transpose(0, 2, 1, 3)
    return store, store[low:high, :, : window.length]
