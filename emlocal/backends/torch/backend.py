"""The contract of `backends/base.py` on torch: CUDA devices, and any CPU.

Each sequence is a slot of the cache. Feeds are cut into passes of similar length (chunking.py); logits stay
on the device, and so does sampling.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emlocal.backends.base import Feed, ModelInfo, Tokenizer
from emlocal.backends.options import LoadOptions
from emlocal.backends.slots import SlotBackend, passes
from emlocal.backends.torch.cache import Decoder
from emlocal.backends.torch.device import Place, out_of_memory
from emlocal.backends.torch.model import packed_bytes
from emlocal.backends.torch.sampler import TorchSampler
from emlocal.errors import BackendError, CancelledError
from emlocal.machine import physical_cores
from emlocal.text import counted

CPU_BUDGET, CUDA_BUDGET = 512, 4096
"""Tokens of a pass: as many as keep the device busy, few enough that memory for activations stays small."""


class TorchBackend(SlotBackend):
    """A transformers model in torch."""

    name: ClassVar[str] = "torch"
    _decoder: Decoder
    _logits: Tensor | None

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
        """`on_device_sampler`: None for what is faster, the host's on CPUs; both draw the same tokens. See
        SlotBackend."""
        if place.on_cpu:
            torch.set_num_threads(options.threads or physical_cores())
        self.place = place
        self._budget = CPU_BUDGET if place.on_cpu else CUDA_BUDGET
        on_device = not place.on_cpu if on_device_sampler is None else on_device_sampler
        sampler = TorchSampler(info.vocabulary, place.device, options.warn) if on_device else None
        super().__init__(model, Decoder(model, place.device), tokenizer, info, options, place, sampler)

    @torch.inference_mode()
    def _compute(self, feeds: Sequence[Feed], lengths: Sequence[int], cancelled: Callable[[], bool]) -> None:
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

    def _fail(self, error: BaseException, feeds: Sequence[Feed], lengths: Sequence[int]) -> None:
        self._undo(feeds, lengths)
        if out_of_memory(error):
            raise BackendError(
                f"{self.place.device} has no memory for {counted(len(feeds), 'sequence')} at once",
                "try a smaller --parallel or --context",
            ) from None

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

    def _on_host(self, at: int) -> NDArray[np.float32]:
        assert self._logits is not None
        row: NDArray[np.float32] = self._logits[at].cpu().numpy()
        return row

    def _threads(self) -> Sequence[str]:
        return (counted(torch.get_num_threads(), "thread"),) if self.place.on_cpu else ()

    @property
    def arithmetic(self) -> str:
        return f"{self.place.device.type}, {self.place.format}"

    def _weights_bytes(self) -> int:
        weights: int = sum(p.nbytes for p in self._model.parameters())
        return weights + packed_bytes(self._model)

    def _give_back(self) -> None:
        if not self.place.on_cpu:
            torch.cuda.empty_cache()
