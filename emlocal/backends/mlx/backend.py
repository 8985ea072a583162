"""The contract of `backends/base.py` on MLX: Apple's GPUs, and on Linux the CPU.

Each sequence is a slot of the cache. All but the last token of a feed is read in passes of similar length
(passes.py), without logits; the last tokens of all feeds then are one step of the batch. MLX computes when it
is told to: that is done within each call here, so that an error or a cancellation belongs to its call, and
statistics to their token.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from emlocal.backends.base import Feed, ModelInfo, Row, check_feeds
from emlocal.backends.mlx.decoder import Decoder
from emlocal.backends.mlx.place import Place
from emlocal.backends.mlx.sampler import MLXSampler
from emlocal.backends.options import KVType, LoadOptions
from emlocal.backends.passes import Chunk, passes
from emlocal.backends.slots import SlotBackend, Slots, Tokenizer
from emlocal.errors import BackendError, CancelledError, UsageError
from emlocal.formatting import counted
from emlocal.sampling import Draw, Sampler

CPU_BUDGET, GPU_BUDGET = 512, 2048
"""Tokens of a pass: as many as keep the device busy, few enough that memory for activations stays small."""
_KV_TYPES: dict[KVType, str] = {"f32": "float32", "f16": "float16"}


class MLXBackend(SlotBackend):
    """An mlx-lm model."""

    name: ClassVar[str] = "mlx"

    def __init__(
        self,
        model: Module,
        tokenizer: Tokenizer,
        info: ModelInfo,
        options: LoadOptions,
        place: Place,
        *,
        on_device_sampler: bool | None = None,
    ) -> None:
        """`on_device_sampler`: None for what is faster, the host's on CPUs; both draw the same tokens.

        Raises ModelError for a model that the decoder cannot run, BackendError where memory runs out.
        """
        super().__init__(tokenizer, info, options)
        self.place = place
        self._model = model
        self._decoder = Decoder(model)
        self._decoder.check()
        if not options.shared:  # all at once: better to fail now than in the middle of a batch
            self._reserve(options.sequences, self.context)
        self._budget = GPU_BUDGET if place.on_gpu else CPU_BUDGET
        self._logits: mx.array | None = None  # float32 [rows, V], of the last call, computed
        if on_device_sampler is None:
            on_device_sampler = place.on_gpu
        self._sampler = MLXSampler(info.vocabulary, on_gpu=place.on_gpu) if on_device_sampler else None
        self._host_sampler = Sampler(info.vocabulary)

    @property
    def _cache(self) -> Slots:
        return self._decoder.cache

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        check_feeds(feeds, self.info.vocabulary)
        self._rows, self._logits = {}, None
        lengths = self._lengths_of(feeds)
        longest = max(held + len(feed.tokens) for feed, held in zip(feeds, lengths, strict=True))
        self._reserve(max(feed.sequence for feed in feeds) + 1, longest)
        try:
            self._compute(feeds, lengths, cancelled)
        except RuntimeError as error:  # MLX has nothing more specific; what is half computed is of no use
            self._decoder.cache.drop()
            self._rows, self._logits = {}, None
            self._lengths = dict.fromkeys(self._lengths, 0)
            raise BackendError(
                f"MLX failed at {counted(len(feeds), 'sequence')} at once: {str(error).splitlines()[0]}",
                "if memory is short, try a smaller --parallel or --context",
            ) from None
        except BaseException:
            self._rows, self._logits = {}, None
            self._undo(feeds, lengths)
            raise
        for feed in feeds:
            self._lengths[feed.sequence] += len(feed.tokens)

    def _compute(self, feeds: Sequence[Feed], lengths: Sequence[int], cancelled: Callable[[], bool]) -> None:
        """All but the last tokens, then the last ones, and keep the rows that are wanted."""
        long = [(feed, held) for feed, held in zip(feeds, lengths, strict=True) if len(feed.tokens) > 1]
        if long:
            heads = [Feed(feed.sequence, feed.tokens[:-1], wanted=False) for feed, _ in long]
            for chunks in passes(heads, [held for _, held in long], self._budget):
                self._decoder.read(chunks, cancelled)
        steps = [
            Chunk(feed.sequence, held + len(feed.tokens) - 1, feed.tokens[-1:], feed.wanted)
            for feed, held in zip(feeds, lengths, strict=True)
        ]
        steps.sort(key=lambda chunk: chunk.slot)
        if cancelled():
            raise CancelledError
        self._logits = self._decoder.step(steps)
        self._rows = {chunk.slot: i for i, chunk in enumerate(steps) if chunk.wanted}

    def _reserve(self, slots: int, tokens: int) -> None:
        try:
            self._decoder.cache.reserve(slots, tokens, self.context)
        except RuntimeError as error:
            raise BackendError(
                f"MLX has no memory for {counted(slots, 'sequence')} of {tokens:,} tokens:"
                f" {str(error).splitlines()[0]}",
                "try a smaller --context or --parallel",
            ) from None

    def sample(self, rows: Sequence[Row]) -> list[Draw]:
        if not rows:  # the last call read prompts only
            return []
        at = [self._rows[row.sequence] for row in rows]
        assert self._logits is not None
        if self._sampler is not None:
            return self._sampler.sample(self._logits, at, rows)
        logits = np.array(self._logits, copy=False)
        return [
            self._host_sampler.sample(logits[i], row.params, row.u, row.seen)
            for i, row in zip(at, rows, strict=True)
        ]

    def logits(self, sequence: int) -> NDArray[np.float32]:
        at = self._rows[sequence]
        assert self._logits is not None
        return np.array(self._logits[at], dtype=np.float32)

    def describe(self) -> str:
        adapters = f", {counted(self._adapters, 'adapter')}" if self._adapters else ""
        return f"context {counted(self.context, 'token')}, {self.place.describe()}{adapters}"

    @property
    def arithmetic(self) -> str:
        return f"{'gpu' if self.place.on_gpu else 'cpu'}, {self.place.format}"

    def memory_bytes(self) -> int:
        parameters: dict[str, mx.array] = tree_flatten(self._model.parameters(), destination={})  # type: ignore[assignment]
        weights: int = sum(array.nbytes for array in parameters.values())
        logits: int = 0 if self._logits is None else self._logits.nbytes
        return weights + self._decoder.cache.nbytes + logits

    def close(self) -> None:
        self._decoder.cache.drop()
        self._rows, self._logits, self._lengths = {}, None, {}
        del self._model, self._decoder
        mx.clear_cache()


def check_kv_type(asked: KVType | None, format_: str) -> None:
    """Raise UsageError unless the keys and values that are asked for have the model's own format."""
    if asked is not None and _KV_TYPES.get(asked) != format_:
        raise UsageError(
            f"--kv-type is {asked}; the mlx engine keeps keys and values as the model"
            f" computes them, in {format_}",
            "leave --kv-type out",
        )
