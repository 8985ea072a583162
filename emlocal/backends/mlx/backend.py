"""The contract of `backends/base.py` on MLX: Apple's GPUs, and on Linux the CPU; and loading of a folder.

Each sequence is a slot of the cache. All but the last token of a feed are read in passes of similar length
(`backends/slots.py`), without logits. The last tokens of all feeds are then one step of the batch. MLX
computes only when it is told to. Each call here tells it, so that an error or a cancellation belongs to its
call, and statistics to their token.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from emlocal.backends.base import Feed, ModelInfo, Tokenizer
from emlocal.backends.engine import LoadOptions, Opened
from emlocal.backends.learner import Descent, EntropyLearner, EntropyObjective
from emlocal.backends.mlx.cache import Decoder
from emlocal.backends.mlx.model import (
    Place,
    attach,
    choose_place,
    context_of,
    linear_layers,
    load_model,
    windows,
)
from emlocal.backends.mlx.sampler import MLXSampler
from emlocal.backends.slots import Chunk, SlotBackend, check_kv_type, passes
from emlocal.errors import BackendError, CancelledError
from emlocal.models.adapters import in_memory
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.folder import FolderHeader, read_folder_header
from emlocal.models.gguf.header import GGUFHeader
from emlocal.models.tokenizer import Tokenizer as FolderTokenizer
from emlocal.text import counted

CPU_BUDGET, GPU_BUDGET = 512, 2048
"""Tokens of a pass: enough to keep the device busy, and few enough to keep the activations small."""


class MLXBackend(SlotBackend):
    """An mlx-lm model."""

    name: ClassVar[str] = "mlx"
    _decoder: Decoder
    _logits: mx.array | None  # computed

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
        """Sets up the engine; see SlotBackend.

        `on_device_sampler`: None for the faster choice, the host's on CPUs; both draw the same tokens.
        """
        self.place = place
        self._budget = GPU_BUDGET if place.on_gpu else CPU_BUDGET
        on_device = place.on_gpu if on_device_sampler is None else on_device_sampler
        sampler = MLXSampler(info.vocabulary, on_gpu=place.on_gpu) if on_device else None
        super().__init__(model, Decoder(model), tokenizer, info, options, place, sampler)

    def _compute(self, feeds: Sequence[Feed], lengths: Sequence[int], cancelled: Callable[[], bool]) -> None:
        long = [(feed, held) for feed, held in zip(feeds, lengths, strict=True) if len(feed.tokens) > 1]
        if long:
            heads = [Feed(feed.sequence, feed.tokens[:-1], wanted=False) for feed, _ in long]
            for chunks in passes(heads, [held for _, held in long], self._budget):
                self._decoder.read(chunks, cancelled)
        steps = [
            Chunk(feed.sequence, held + len(feed.tokens) - 1, feed.tokens[-1:], bool(feed.wanted))
            for feed, held in zip(feeds, lengths, strict=True)
        ]
        steps.sort(key=lambda chunk: chunk.slot)
        if cancelled():
            raise CancelledError
        self._logits = self._decoder.step(steps)
        self._rows = {chunk.slot: i for i, chunk in enumerate(steps) if chunk.wanted}

    def _fail(self, error: BaseException, feeds: Sequence[Feed], lengths: Sequence[int]) -> None:
        if not isinstance(error, RuntimeError):
            self._undo(feeds, lengths)
            return
        # MLX has no more specific error; the half-computed parts are useless
        self._decoder.cache.drop()
        self._lengths = dict.fromkeys(self._lengths, 0)
        raise BackendError(
            f"MLX failed at {counted(len(feeds), 'sequence')} at once: {str(error).splitlines()[0]}",
            "set a smaller --parallel or --context if memory is short",
        ) from None

    def _reserve(self, slots: int, tokens: int) -> None:
        try:
            self._decoder.cache.reserve(slots, tokens, self.context)
        except RuntimeError as error:
            raise BackendError(
                f"MLX has no memory for {counted(slots, 'sequence')} of {tokens:,} tokens:"
                f" {str(error).splitlines()[0]}",
                "set a smaller --context or --parallel",
            ) from None

    def _on_host(self, at: int) -> NDArray[np.float32]:
        assert self._logits is not None
        row: NDArray[np.float32] = np.array(self._logits, copy=False)[at]
        return row

    @property
    def arithmetic(self) -> str:
        return f"{'gpu' if self.place.on_gpu else 'cpu'}, {self.place.format}"

    def _weights_bytes(self) -> int:
        parameters: dict[str, mx.array] = tree_flatten(self._model.parameters(), destination={})  # type: ignore[assignment]
        return sum(array.nbytes for array in parameters.values())

    def _give_back(self) -> None:
        mx.clear_cache()


class MLXModel(Opened):
    """A model in MLX, to train or to make an engine of."""

    place: Place

    def backend(self, options: LoadOptions, *, on_device_sampler: bool | None = None) -> MLXBackend:
        return MLXBackend(
            self.model, self.tokenizer, self.info, options, self.place, on_device_sampler=on_device_sampler
        )

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        return linear_layers(self.model)

    def entropy_learner(
        self, adapter: Adapter, descent: Descent, objective: EntropyObjective, *, checkpointing: bool
    ) -> EntropyLearner:
        from emlocal.backends.mlx.learner import MLXEntropyLearner

        return MLXEntropyLearner(self.model, adapter, descent, objective, checkpointing=checkpointing)


def open_model(folder: Path, *, name: str = "", device: str = "auto", dtype: str = "auto") -> MLXModel:
    """Loads the model in `folder`. `name`: what people call it.

    Raises ModelError for a folder that cannot be used, UsageError for an unknown device or format.
    """
    header = read_folder_header(folder)
    return _open(header, choose_place(header.tensors, device, dtype), name)


def _open(header: FolderHeader, place: Place, name: str) -> MLXModel:
    tokenizer = FolderTokenizer(header.path)
    model = load_model(header, place)
    info = ModelInfo.of_folder(header, tokenizer, name)
    info = replace(info, trained_context=context_of(header, windows(model)))
    return MLXModel(model, tokenizer, info, place)


def open_folder(
    folder: Path,
    options: LoadOptions,
    *,
    name: str = "",
    base: GGUFHeader | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_device_sampler: bool | None = None,
) -> MLXBackend:
    """Returns the engine on the model in `folder`, with its adapters.

    Args:
        name: what people call it.
        base: header of the GGUF model that the folder was unpacked from; adapters in GGUF need it.
        on_device_sampler: see MLXBackend.

    Raises ModelError for a folder or adapter that cannot be used, UsageError for bad options.
    """
    header = read_folder_header(folder)
    place = choose_place(header.tensors, device, dtype)
    check_kv_type("mlx", options.kv_type, place.format)
    adapters = [(in_memory(adapter, base), scale) for adapter, scale in options.adapters]
    opened = _open(header, place, name)
    for adapter, strength in adapters:
        attach(opened.model, adapter, strength, place.dtype, opened.info.name)
    return opened.backend(options, on_device_sampler=on_device_sampler)
