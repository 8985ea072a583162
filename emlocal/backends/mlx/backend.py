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

from emlocal.backends.base import Backend, Feed, ModelInfo, Row, check_feeds
from emlocal.backends.context import context_length
from emlocal.backends.mlx.decoder import Decoder
from emlocal.backends.mlx.place import Place
from emlocal.backends.mlx.sampler import MLXSampler
from emlocal.backends.options import KVType, LoadOptions
from emlocal.backends.passes import Chunk, passes
from emlocal.errors import BackendError, CancelledError, ContextFullError, UsageError
from emlocal.models.tokenizer import Tokenizer
from emlocal.sampling import Draw, Sampler
from emlocal.words import counted

CPU_BUDGET, GPU_BUDGET = 512, 2048
"""Tokens of a pass: as many as keep the device busy, few enough that memory for activations stays small."""
_KV_TYPES: dict[KVType, str] = {"f32": "float32", "f16": "float16"}


class MLXBackend(Backend):
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
        self.info = info
        self.context = context_length(options.context, info.trained_context)
        self.max_sequences = options.sequences
        self.place = place
        self._model = model
        self._tokenizer = tokenizer
        self._adapters = len(options.adapters)
        self._decoder = Decoder(model)
        self._decoder.check()
        if not options.shared:  # all at once: better to fail now than in the middle of a batch
            self._reserve(options.sequences, self.context)
        self._budget = GPU_BUDGET if place.on_gpu else CPU_BUDGET
        self._lengths: dict[int, int] = {}
        self._logits: mx.array | None = None  # float32 [rows, V], of the last call, computed
        self._rows: dict[int, int] = {}
        if on_device_sampler is None:
            on_device_sampler = place.on_gpu
        self._sampler = MLXSampler(info.vocabulary, on_gpu=place.on_gpu) if on_device_sampler else None
        self._host_sampler = Sampler(info.vocabulary)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def control_texts(self) -> Sequence[str]:
        return self._tokenizer.control_texts()

    def token_bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)

    def open(self) -> int:
        free = next((s for s in range(self.max_sequences) if s not in self._lengths), None)
        if free is None:
            raise BackendError(f"all {self.max_sequences} sequences are in use")
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
        lengths = [self._lengths[feed.sequence] for feed in feeds]
        self._check_room(feeds, lengths)
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
            for feed, held in zip(feeds, lengths, strict=True):  # what was computed of this call goes again
                self._decoder.cache.clear(feed.sequence, held, held + len(feed.tokens))
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

    def _check_room(self, feeds: Sequence[Feed], lengths: Sequence[int]) -> None:
        for feed, held in zip(feeds, lengths, strict=True):
            if held + len(feed.tokens) > self.context:
                raise ContextFullError(
                    f"{counted(len(feed.tokens), 'more token')} cannot be added: the sequence"
                    f" holds {held:,} of {self.context:,}",
                    "give a larger --context",
                )

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
