"""The contract of `backends/base.py` on torch: CUDA devices, and any CPU.

Each sequence is a slot of the cache. Feeds are cut into passes of similar length (passes.py); logits stay on
the device, and so does sampling.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emlocal.backends.base import Feed, ModelInfo, Row, check_feeds
from emlocal.backends.cpu import physical_cores
from emlocal.backends.options import KVType, LoadOptions
from emlocal.backends.passes import passes
from emlocal.backends.slots import SlotBackend, Slots, Tokenizer
from emlocal.backends.torch.decoder import Decoder
from emlocal.backends.torch.device import Place, out_of_memory
from emlocal.backends.torch.packed import packed_bytes
from emlocal.backends.torch.sampler import TorchSampler
from emlocal.errors import BackendError, CancelledError, UsageError
from emlocal.formatting import counted
from emlocal.sampling import Draw, Sampler

CPU_BUDGET, CUDA_BUDGET = 512, 4096
"""Tokens of a pass: as many as keep the device busy, few enough that memory for activations stays small."""
_KV_TYPES: dict[KVType, torch.dtype] = {"f32": torch.float32, "f16": torch.float16}


class TorchBackend(SlotBackend):
    """A transformers model in torch."""

    name: ClassVar[str] = "torch"

    def __init__(
        self,
        model: nn.Module,
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
        if place.device.type == "cpu":
            torch.set_num_threads(options.threads or physical_cores())
        super().__init__(tokenizer, info, options)
        self.place = place
        self._model: Any = model
        self._decoder = Decoder(model, place.device)
        self._decoder.check()
        if not options.shared:  # all at once: better to fail now than in the middle of a batch
            self._reserve(options.sequences, self.context)
        self._budget = CPU_BUDGET if place.device.type == "cpu" else CUDA_BUDGET
        self._logits: Tensor | None = None  # float32 [rows, V], of the last call
        if on_device_sampler is None:
            on_device_sampler = place.device.type != "cpu"
        self._sampler = TorchSampler(info.vocabulary, place.device) if on_device_sampler else None
        self._host_sampler = Sampler(info.vocabulary)

    @property
    def _cache(self) -> Slots:
        return self._decoder.cache

    @torch.inference_mode()
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
            self._undo(feeds, lengths)
            if out_of_memory(error):
                raise BackendError(
                    f"{self.place.device} has no memory for {counted(len(feeds), 'sequence')} at once",
                    "try a smaller --parallel or --context",
                ) from None
            raise
        for feed in feeds:
            self._lengths[feed.sequence] += len(feed.tokens)

    def _compute(self, feeds: Sequence[Feed], lengths: Sequence[int], cancelled: Callable[[], bool]) -> None:
        """Run the passes and keep the rows that are wanted."""
        rows: list[Tensor] = []
        for chunks in passes(feeds, lengths, self._budget):
            # a step is over before anybody could cancel it
            single = all(len(chunk.tokens) == 1 for chunk in chunks)
            logits = self._decoder.run(chunks, (lambda: False) if single else cancelled)
            if logits is not None:
                rows.append(logits)
                wanted = [chunk.slot for chunk in chunks if chunk.wanted]
                self._rows.update(zip(wanted, itertools.count(len(self._rows)), strict=False))
        if cancelled():
            raise CancelledError
        if rows:
            self._logits = rows[0] if len(rows) == 1 else torch.cat(rows)

    def _reserve(self, slots: int, tokens: int) -> None:
        try:
            with torch.inference_mode():
                self._decoder.cache.reserve(slots, tokens, self.context)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise BackendError(
                f"{self.place.device} has no memory for {counted(slots, 'sequence')} of {tokens:,} tokens",
                "try a smaller --context or --parallel",
            ) from None

    @torch.inference_mode()
    def sample(self, rows: Sequence[Row]) -> list[Draw]:
        if not rows:  # the last call read prompts only
            return []
        at = [self._rows[row.sequence] for row in rows]
        assert self._logits is not None
        if self._sampler is not None:
            return self._sampler.sample(self._logits, at, rows)
        logits = self._logits.numpy()
        return [
            self._host_sampler.sample(logits[i], row.params, row.u, row.seen)
            for i, row in zip(at, rows, strict=True)
        ]

    @torch.inference_mode()
    def logits(self, sequence: int) -> NDArray[np.float32]:
        at = self._rows[sequence]
        assert self._logits is not None
        row: NDArray[np.float32] = self._logits[at].to("cpu", copy=True).numpy()
        return row

    def describe(self) -> str:
        threads = f", {counted(torch.get_num_threads(), 'thread')}" if self.place.device.type == "cpu" else ""
        adapters = f", {counted(self._adapters, 'adapter')}" if self._adapters else ""
        return f"context {counted(self.context, 'token')}, {self.place.describe()}{threads}{adapters}"

    @property
    def arithmetic(self) -> str:
        return f"{self.place.device.type}, {str(self.place.dtype).removeprefix('torch.')}"

    def memory_bytes(self) -> int:
        weights: int = sum(p.nbytes for p in self._model.parameters()) + packed_bytes(self._model)
        logits = 0 if self._logits is None else self._logits.nbytes
        return weights + self._decoder.cache.nbytes + logits

    def close(self) -> None:
        self._decoder.cache.drop()
        self._rows, self._logits, self._lengths = {}, None, {}
        del self._model, self._decoder
        if self.place.device.type == "cuda":
            torch.cuda.empty_cache()


def check_kv_type(asked: KVType | None, dtype: torch.dtype) -> None:
    """Raise UsageError unless the keys and values that are asked for have the model's own format."""
    if asked is not None and _KV_TYPES.get(asked) != dtype:
        name = str(dtype).removeprefix("torch.")
        raise UsageError(
            f"--kv-type is {asked}; the torch engine keeps keys and values as the model"
            f" computes them, in {name}",
            "leave --kv-type out",
        )
