"""The half of torch and mlx that is the same: a separate tokenizer, and a slot of a cache for each sequence.

A rule decides what is shared. Code that runs on the host and would be the same in both is here, in
device_sampler.py or in learner.py: the contract's bookkeeping, options, settings, errors. Code that touches
an engine's arrays is in that engine's folder, in files of the same names (backend, cache, learner, model,
sampler), even if the two look alike. The libraries differ in what is quick, in what is exact and in when they
compute, and one text for both would be a third library of arrays.

`passes` cuts the feeds of one call into forward passes, so that few unneeded numbers are computed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emlocal.backends.base import Feed, ModelInfo, Row, Tokenizer, Tokenizing, check_feeds, free_sequence
from emlocal.backends.device_sampler import DeviceSampler, kernel_of
from emlocal.backends.engine import KVType, LoadOptions, Place, context_length
from emlocal.errors import BackendError, ContextFullError, UsageError
from emlocal.sampling import Draw, Sampler
from emlocal.text import counted

BLOCK = 256
"""Tokens; a cache's capacity is a multiple of it."""
_KV_TYPES: dict[KVType, str] = {"f32": "float32", "f16": "float16"}


class SlotCache(ABC):
    """Keys and values of all layers: cells for each token of each slot."""

    slots = 0
    capacity = 0

    def reserve(self, slots: int, tokens: int, limit: int) -> None:
        """Makes room for this many slots and tokens; grows by half at least, up to `limit` tokens.

        It works array by array, so that there are never two copies of the whole cache. If memory runs out it
        raises the library's RuntimeError, and the cache is as before.
        """
        if tokens > self.capacity:
            tokens = max(tokens, min(self.capacity * 3 // 2, limit))
            tokens = (tokens + BLOCK - 1) // BLOCK * BLOCK
        slots, tokens = max(slots, self.slots), max(tokens, self.capacity)
        if (slots, tokens) == (self.slots, self.capacity):
            return
        try:
            self._grow(slots, tokens)
        except RuntimeError:
            self._shrink()
            raise
        self.slots, self.capacity = slots, tokens

    @abstractmethod
    def _grow(self, slots: int, tokens: int) -> None:
        """Brings every array to this size."""

    @abstractmethod
    def _shrink(self) -> None:
        """Brings every array back to `slots` and `capacity`, after `_grow` failed half-way."""

    @abstractmethod
    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` cells of one slot into another, empty one."""

    @abstractmethod
    def clear(self, slot: int, start: int, stop: int) -> None:
        """Zeroes these cells: a masked NaN would still spoil attention, as 0 · NaN is NaN."""

    @abstractmethod
    def drop(self) -> None:
        """Frees everything."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated."""


class Decoder(Protocol):
    """The parts of an engine's decoder that are used here."""

    @property
    def cache(self) -> SlotCache: ...
    def check(self) -> None:
        """Raises ModelError for a model that it cannot run."""


class SlotBackend(Tokenizing):
    """An engine whose sequences are the slots of a cache; each has room for the whole context.

    Its logits, `_logits`, are an array of the engine's, float32 [rows, V]; None before the first call.
    """

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        tokenizer: Tokenizer,
        info: ModelInfo,
        options: LoadOptions,
        place: Place,
        sampler: DeviceSampler | None,
    ) -> None:
        """Sets up the engine. `sampler`: None to draw on the host; both draw the same tokens.

        Raises ModelError for a model that the decoder cannot run, BackendError if memory runs out.
        """
        self.info = info
        self.context = context_length(options.context, info.trained_context)
        self.max_sequences = options.sequences
        self._place = place
        self._model, self._decoder = model, decoder
        self._tokenizer = tokenizer
        self._adapters = len(options.adapters)
        self._lengths: dict[int, int] = {}
        self._rows: dict[int, int] = {}  # index of each sequence's row in the last call's logits
        self._logits: Any = None
        self._sampler = sampler
        self._host_sampler = Sampler(info.vocabulary)
        decoder.check()
        if not options.shared:  # all at once: it is better to fail now than in the middle of a batch
            self._reserve(options.sequences, self.context)

    @abstractmethod
    def _reserve(self, slots: int, tokens: int) -> None:
        """Makes room for this many slots of this many tokens. Raises BackendError if memory runs out."""

    @abstractmethod
    def _compute(self, feeds: Sequence[Feed], lengths: Sequence[int], cancelled: Callable[[], bool]) -> None:
        """Runs the passes and keeps the rows that are wanted. `lengths`: tokens held before."""

    @abstractmethod
    def _fail(self, error: BaseException, feeds: Sequence[Feed], lengths: Sequence[int]) -> None:
        """Brings the sequences back to these lengths after `_compute` raised an error.

        Raises BackendError for an error of the library's that has a plainer name; the caller raises others.
        """

    @abstractmethod
    def _on_host(self, at: int) -> NDArray[np.float32]:
        """Returns a row of the logits, float32 [V]; a view if it can be one."""

    @abstractmethod
    def _weights_bytes(self) -> int:
        """Returns the bytes of the model."""

    @abstractmethod
    def _give_back(self) -> None:
        """Lets the library free memory that is no longer used."""

    def open(self) -> int:
        free = free_sequence(self._lengths, self.max_sequences)
        self._lengths[free] = 0
        return free

    def release(self, sequence: int) -> None:
        self._decoder.cache.clear(sequence, 0, self._lengths.pop(sequence))
        self._rows.pop(sequence, None)

    def length(self, sequence: int) -> int:
        return self._lengths[sequence]

    def fork(self, sequence: int) -> int:
        length = self._lengths[sequence]
        copy = self.open()
        if length:
            try:
                self._reserve(copy + 1, length)
            except BackendError:
                del self._lengths[copy]
                raise
            self._decoder.cache.copy(sequence, copy, length)
        self._lengths[copy] = length
        return copy

    def trim(self, sequence: int, length: int) -> int:
        held = self._lengths[sequence]
        if length < held:
            self._decoder.cache.clear(sequence, length, held)
            self._lengths[sequence] = length
        return self._lengths[sequence]

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        check_feeds(feeds, self.info.vocabulary)
        self._rows, self._logits = {}, None
        lengths = self._lengths_of(feeds)
        longest = max(held + len(feed.tokens) for feed, held in zip(feeds, lengths, strict=True))
        self._reserve(max(feed.sequence for feed in feeds) + 1, longest)
        try:
            self._compute(feeds, lengths, cancelled)
        except BaseException as error:
            self._rows, self._logits = {}, None
            self._fail(error, feeds, lengths)
            raise
        for feed in feeds:
            self._lengths[feed.sequence] += len(feed.tokens)

    def _lengths_of(self, feeds: Sequence[Feed]) -> list[int]:
        """Returns how many tokens the sequences hold. Raises ContextFullError if the feeds do not fit."""
        lengths = [self._lengths[feed.sequence] for feed in feeds]
        for feed, held in zip(feeds, lengths, strict=True):
            if held + len(feed.tokens) > self.context:
                raise ContextFullError(
                    f"{counted(len(feed.tokens), 'more token')} cannot be added: the sequence"
                    f" holds {held:,} of {self.context:,}",
                    "set a larger --context",
                )
        return lengths

    def _undo(self, feeds: Sequence[Feed], lengths: Sequence[int]) -> None:
        """Clears the cells that a failed call has written."""
        for feed, held in zip(feeds, lengths, strict=True):
            self._decoder.cache.clear(feed.sequence, held, held + len(feed.tokens))

    def sample(self, rows: Sequence[Row]) -> list[Draw]:
        """Draws a token for each row.

        Rows whose EM step has no kernel on the device are drawn on the host, by the step's reference.
        """
        there = [i for i, row in enumerate(rows) if self._sampler and kernel_of(row.params.em)]
        draws: dict[int, Draw] = {}
        if there and self._sampler:
            at = [self._rows[rows[i].sequence] for i in there]
            drawn = self._sampler.sample(self._logits, at, [rows[i] for i in there])
            draws = dict(zip(there, drawn, strict=True))
        return [
            draws[i]
            if i in draws
            else self._host_sampler.sample(
                self._on_host(self._rows[r.sequence]), r.params, r.u, r.seen, r.legal
            )
            for i, r in enumerate(rows)
        ]

    def logits(self, sequence: int, back: int = 0) -> NDArray[np.float32]:
        if back:
            raise KeyError(back)
        return self._on_host(self._rows[sequence]).copy()

    def describe(self) -> str:
        parts = [f"context {counted(self.context, 'token')}", self._place.describe(), *self._threads()]
        return ", ".join([*parts, counted(self._adapters, "adapter")] if self._adapters else parts)

    def _threads(self) -> Sequence[str]:
        """Returns the number of CPU threads in words, if the engine can set it; otherwise nothing."""
        return ()

    def memory_bytes(self) -> int:
        logits: int = 0 if self._logits is None else self._logits.nbytes
        return self._weights_bytes() + self._decoder.cache.nbytes + logits

    def close(self) -> None:
        self._decoder.cache.drop()
        self._rows, self._logits, self._lengths = {}, None, {}
        del self._model, self._decoder
        self._give_back()


def check_kv_type(engine: str, asked: KVType | None, computed: str) -> None:
    """Raises UsageError unless `asked` is None or the format of keys and values that the model computes.

    `computed` is that format ("float32").
    """
    if asked is not None and _KV_TYPES.get(asked) != computed:
        raise UsageError(
            f"--kv-type is {asked}; the {engine} engine keeps keys and values in the"
            f" model's own format, {computed}",
            "leave --kv-type out",
        )


ALIKE = 0.8
"""The least length of a chunk that shares a pass, as a share of the longest; the rest is padding."""


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that one pass computes."""

    slot: int
    start: int
    """The position of the first token."""
    tokens: Sequence[int]
    wanted: bool
    """Whether the logits after the last token are wanted."""

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens)


def passes(feeds: Sequence[Feed], lengths: Sequence[int], budget: int) -> Iterator[list[Chunk]]:
    """Yields passes of at most `budget` tokens, padding included, in an order in which they can run.

    Args:
        lengths: tokens held by each feed's sequence before the call.
    """
    longest = max(len(feed.tokens) for feed in feeds)
    for i in range(0, longest, budget):
        chunks = [
            Chunk(
                feed.sequence,
                held + i,
                feed.tokens[i : i + budget],
                bool(feed.wanted) and i + budget >= len(feed.tokens),
            )
            for feed, held in zip(feeds, lengths, strict=True)
            if len(feed.tokens) > i
        ]
        yield from _of_similar_length(chunks, budget)


def _of_similar_length(chunks: list[Chunk], budget: int) -> Iterator[list[Chunk]]:
    """Yields groups, those with the longest chunks first; within a group by slot, ascending."""
    group: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: (-len(chunk.tokens), chunk.slot)):
        longest = len(group[0].tokens) if group else 0
        if group and (len(chunk.tokens) < ALIKE * longest or (len(group) + 1) * longest > budget):
            yield sorted(group, key=lambda chunk: chunk.slot)
            group = []
        group.append(chunk)
    yield sorted(group, key=lambda chunk: chunk.slot)
