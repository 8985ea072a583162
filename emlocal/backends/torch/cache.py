"""Keys and values by slots: one slot for each sequence of the contract.

A layer's keys are one tensor [slots, kv_heads, capacity + 1, head_dim], its values another. Rows of a forward
pass are a range of slots, which attention reads as a view; nothing is copied in a decoding step. Cells at and
beyond a sequence's length are zero. The last cell of a slot, which is never read, takes what padding and rows
that only fill a gap would write.

`Decoder` runs forward passes of a transformers model over chunks of several sequences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from emlocal.backends.slots import Chunk, SlotCache
from emlocal.errors import CancelledError, ModelError


@dataclass(frozen=True)
class Window:
    """The cells that one forward pass reads and writes."""

    rows: Tensor
    """Slots, int64 [B, 1], ascending."""
    adjacent: bool
    """Whether the slots follow in order, so that a view has them."""
    cells: Tensor
    """The cell of each token, int64 [B, T]; the slot's last cell for tokens that are not kept."""
    span: tuple[int, int] | None
    """First cell and the one past the last, if all rows write the same cells in order; otherwise None."""
    first: int
    """The lowest slot."""
    length: int
    """Number of cells to read."""


class TorchCache(SlotCache, Cache):
    """The cache that transformers' models use: their attention calls `update`."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._window: Window | None = None
        self._cancelled: Callable[[], bool] = lambda: False

    def begin(self, window: Window, cancelled: Callable[[], bool]) -> None:
        """Sets what the next pass reads and writes; `cancelled` is called at each layer."""
        self._window, self._cancelled = window, cancelled

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values, [B, kv_heads, T, head_dim].

        Returns all keys and values up to the window's length. Raises CancelledError.
        """
        if self._cancelled():
            raise CancelledError
        assert self._window is not None
        while len(self._keys) <= layer_idx:  # in the first pass: the shapes are not known before
            self._keys.append(_zeros(key_states, self.slots, self.capacity))
            self._values.append(_zeros(value_states, self.slots, self.capacity))
        return (
            _store(self._keys[layer_idx], key_states, self._window),
            _store(self._values[layer_idx], value_states, self._window),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the cells held before the pass.

        transformers asks for it, and it has a meaning, only without an explicit mask.
        """
        assert self._window is not None
        return self._window.length - self._window.cells.shape[1]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Returns the position of the pass's first token, for passes without an explicit mask."""
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Returns length and offset of the cells that attention reads."""
        assert self._window is not None
        return self._window.length, 0

    @property
    def layers_held(self) -> int:
        """Number of layers that have stored something."""
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
    """Returns an empty store for states with these heads and dimensions, with one spare cell per slot."""
    return like.new_zeros(slots, like.shape[1], tokens + 1, like.shape[3])


def _store(store: Tensor, new: Tensor, window: Window) -> Tensor:
    """Writes [B, kv_heads, T, head_dim] into its cells; returns the cells that attention reads."""
    low, high = window.first, window.first + len(new)
    if window.adjacent and window.span is not None:
        store[low:high, :, window.span[0] : window.span[1]] = new
    else:
        store[window.rows, :, window.cells] = new.transpose(1, 2)
    if window.adjacent:
        return store[low:high, :, : window.length]
    return store[:, :, : window.length].index_select(0, window.rows[:, 0])


def is_range(slots: Sequence[int]) -> bool:
    """Returns whether ascending slots follow in order."""
    return slots[-1] - slots[0] + 1 == len(slots)


_UNLIKE = 0.3
"""Limit in standard deviations of the logits. Rounding in bfloat16 makes 0.1, another computation over 1."""
GAPS = 2
"""Decoding also computes gaps between slots, up to this many times the rows asked for; then it copies."""


class Decoder:
    """A causal language model and the cache that it reads and writes.

    Raises ModelError for a model that keeps its state elsewhere than in a cache of keys and values.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.cache = TorchCache()
        self.device = device
        untyped: Any = model  # transformers' models have no useful static types
        self._model = untyped
        config = untyped.config.to_dict()
        self._base = untyped.get_decoder()
        self._head = untyped.get_output_embeddings()
        self._windows = attention_windows(config)
        self._scale = (config.get("logit_scale") or 1.0) / (config.get("logits_scaling") or 1.0)
        self._softcap: float | None = config.get("final_logit_softcapping")

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], cancelled: Callable[[], bool]) -> Tensor | None:
        """Computes the chunks, of different slots in ascending order, and stores their keys and values.

        Returns the logits that chunks want, in their order, float32 [wanted, V]; None if no chunk wants any.
        Raises CancelledError.
        """
        rows = self._with_gaps(chunks)
        width = max(len(chunk.tokens) for chunk in chunks)
        length = max(chunk.stop for chunk in chunks)
        ids, positions, cells = self._inputs(rows, width)
        slots = [chunk.slot for chunk in rows]
        whole = all(chunk.stop == length and len(chunk.tokens) == width for chunk in rows)
        window = Window(
            rows=torch.tensor(slots, device=self.device)[:, None],
            adjacent=is_range(slots),
            cells=cells,
            span=(length - width, length) if whole else None,
            first=slots[0],
            length=length,
        )
        self.cache.begin(window, cancelled)
        hidden = self._base(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._mask(positions, length, whole and width in (1, length)),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        wanted = [(i, len(chunk.tokens) - 1) for i, chunk in enumerate(rows) if chunk.wanted]
        if not wanted:
            return None
        at = torch.tensor(wanted, device=self.device)
        return self._logits(hidden[at[:, 0], at[:, 1]])

    def _with_gaps(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        """Returns the chunks, with empty rows in between if a view of the cache then works and is cheap."""
        first, last = chunks[0].slot, chunks[-1].slot
        single = all(len(chunk.tokens) == 1 for chunk in chunks)
        if is_range([chunk.slot for chunk in chunks]) or not single or last - first >= GAPS * len(chunks):
            return chunks
        by_slot = {chunk.slot: chunk for chunk in chunks}
        return [by_slot.get(slot, Chunk(slot, 0, (), False)) for slot in range(first, last + 1)]

    def _inputs(self, rows: Sequence[Chunk], width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns token ids, positions and cells, each int64 [B, T]; padding is on the right.

        Padding has the position of the row's last token, so that it sees some cells; it is not kept.
        """
        inputs = np.zeros((3, len(rows), width), dtype=np.int64)
        ids, positions, cells = inputs
        cells[:] = self.cache.capacity
        for i, chunk in enumerate(rows):
            n = len(chunk.tokens)
            ids[i, :n] = chunk.tokens
            cells[i, :n] = np.arange(chunk.start, chunk.stop)
            positions[i] = max(chunk.stop - 1, 0)
            positions[i, :n] = cells[i, :n]
        on_device = torch.from_numpy(inputs).to(self.device)
        return on_device[0], on_device[1], on_device[2]

    def _mask(self, positions: Tensor, length: int, plain: bool) -> Tensor | dict[str, Tensor] | None:
        """Returns which cells each token sees, bool [B, 1, T, length], by type of layer if there are several.

        None if it is the usual causal mask (`plain`), for which attention has quicker kernels.
        """
        if plain and all(size is None or size >= length for size in self._windows.values()):
            return None
        here, cells = positions[:, None, :, None], torch.arange(length, device=self.device)
        causal = cells <= here
        masks = {
            kind: causal if size is None else causal & (cells > here - size)
            for kind, size in self._windows.items()
        }
        # a model whose layers are all alike takes a tensor, others take a dictionary
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits: [n, hidden] → float32 [n, V]."""
        logits: Tensor = self._head(hidden).float() * self._scale
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits

    @torch.inference_mode()
    def check(self) -> None:
        """Compares logits with the cache and without it, on four tokens: a test of this class's assumptions.

        Raises ModelError if the logits differ, or if layers did not use the cache.
        """
        architecture = type(self._model).__name__
        tokens = list(range(4))
        expected = self._model(input_ids=torch.tensor([tokens], device=self.device)).logits[0, -1].float()
        self.cache.reserve(1, len(tokens), len(tokens))
        self.run([Chunk(0, 0, tokens[:2], False)], lambda: False)
        self.run([Chunk(0, 2, tokens[2:3], False)], lambda: False)
        got = self.run([Chunk(0, 3, tokens[3:], True)], lambda: False)
        self.cache.clear(0, 0, len(tokens))
        layers = self._model.config.num_hidden_layers
        if self.cache.layers_held != layers:
            raise ModelError(
                f"{architecture} does not run on the torch engine: only {self.cache.layers_held} of"
                f" its {layers} layers"
                " keep keys and values"
            )
        assert got is not None
        if not expected.isfinite().all():
            raise ModelError(
                f"{architecture}'s logits are not finite: its weights are damaged", "fetch the model again"
            )
        far = float((got[0] - expected).square().mean().sqrt() / expected.std())
        if not far < _UNLIKE:
            raise ModelError(
                f"{architecture} does not run on the torch engine: token by token its logits are"
                f" off by {far:.2g}"
                " standard deviations"
            )


def attention_windows(config: Mapping[str, Any]) -> dict[str, int | None]:
    """Returns how far back layers see, by their type; None: to the beginning.

    Raises ModelError for layers other than those of full and sliding attention.
    """
    size: int | None = config.get("sliding_window")
    if config.get("use_sliding_window") is False:
        size = None
    kinds = dict.fromkeys(config.get("layer_types") or ("sliding_attention" if size else "full_attention",))
    windows = {"full_attention": None, "sliding_attention": size}
    for kind in kinds:
        if kind not in windows:
            raise ModelError(
                f"{config.get('model_type')} has layers of {kind}; the torch engine computes full and"
                " sliding attention only"
            )
    return {kind: windows[kind] for kind in kinds}
