"""Keys and values by slots: one slot for each sequence of the contract.

A layer's keys are one tensor [slots, kv_heads, capacity + 1, head_dim], its values another. Rows of a forward
pass are a range of slots, which attention reads as a view; nothing is copied in a decoding step. Cells at and
beyond a sequence's length are zero. The last cell of a slot, never read, takes what padding and rows
that only fill a gap would write.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from emlocal.backends.slots import SlotCache
from emlocal.errors import CancelledError


@dataclass(frozen=True)
class Window:
    """What one forward pass reads and writes."""

    rows: Tensor
    """Slots, int64 [B, 1], ascending."""
    adjacent: bool
    """Whether they follow in order, so that a view holds them."""
    cells: Tensor
    """Where each token is written, int64 [B, T]; the slot's last cell for those that are not kept."""
    span: tuple[int, int] | None
    """First cell and the one past the last, where all rows write the same ones in order."""
    first: int
    """The lowest slot."""
    length: int
    """Cells to be read."""


class TorchCache(SlotCache, Cache):
    """Stands where transformers expects its cache: the model's attention calls `update`."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._window: Window | None = None
        self._cancelled: Callable[[], bool] = lambda: False

    def begin(self, window: Window, cancelled: Callable[[], bool]) -> None:
        """Say what the next pass reads and writes; `cancelled` is asked at each layer."""
        self._window, self._cancelled = window, cancelled

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, [B, kv_heads, T, head_dim]; all up to the window's length.

        Raises CancelledError.
        """
        if self._cancelled():
            raise CancelledError
        assert self._window is not None
        while len(self._keys) <= layer_idx:  # the first pass: only now are the shapes known
            self._keys.append(_zeros(key_states, self.slots, self.capacity))
            self._values.append(_zeros(value_states, self.slots, self.capacity))
        return (
            _store(self._keys[layer_idx], key_states, self._window),
            _store(self._values[layer_idx], value_states, self._window),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cells held before the pass; meaningful, and asked for, where no explicit mask is given."""
        assert self._window is not None
        return self._window.length - self._window.cells.shape[1]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The position of the pass's first token, where no explicit mask is given."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of what attention reads."""
        assert self._window is not None
        return self._window.length, 0

    @property
    def layers_held(self) -> int:
        """Layers that have stored something."""
        return len(self._keys)

    def _grow(self, slots: int, tokens: int) -> None:
        for tensors in (self._keys, self._values):
            for i, old in enumerate(tensors):
                grown = _zeros(old, slots, tokens)
                grown[: self.slots, :, : self.capacity] = old[:, :, : self.capacity]
                tensors[i] = grown

    def _shrink(self) -> None:
        for tensors in (self._keys, self._values):
            tensors[:] = [tensor[: self.slots, :, : self.capacity + 1] for tensor in tensors]

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        for tensor in (*self._keys, *self._values):
            tensor[target, :, :length] = tensor[source, :, :length]

    @torch.inference_mode()
    def clear(self, slot: int, start: int, stop: int) -> None:
        if slot < self.slots:
            for tensor in (*self._keys, *self._values):
                tensor[slot, :, start : min(stop, self.capacity)] = 0

    def drop(self) -> None:
        self._keys, self._values, self.slots, self.capacity = [], [], 0, 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))


def _zeros(like: Tensor, slots: int, tokens: int) -> Tensor:
    """An empty store for states with these heads and dimensions, of so many tokens and the spare cell."""
    return like.new_zeros(slots, like.shape[1], tokens + 1, like.shape[3])


def _store(store: Tensor, new: Tensor, window: Window) -> Tensor:
    """Write [B, kv_heads, T, head_dim] where it belongs; give back all that attention reads."""
    low, high = window.first, window.first + len(new)
    if window.adjacent and window.span is not None:
        store[low:high, :, window.span[0] : window.span[1]] = new
    else:
        store[window.rows, :, window.cells] = new.transpose(1, 2)
    if window.adjacent:
        return store[low:high, :, : window.length]
    return store[:, :, : window.length].index_select(0, window.rows[:, 0])


def is_range(slots: Sequence[int]) -> bool:
    """Whether ascending slots follow in order."""
    return slots[-1] - slots[0] + 1 == len(slots)
