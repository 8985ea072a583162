"""The contract of `backends/base.py` on torch: CUDA devices and any CPU; and loading of a folder.

Each sequence is a slot of the cache. Feeds are cut into passes of similar length (`backends/slots.py`);
logits stay on the device, and sampling runs there.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emlocal.backends.base import Feed, ModelInfo, Tokenizer
from emlocal.backends.engine import LoadOptions, Opened
from emlocal.backends.learner import Descent, EntropyLearner, EntropyObjective, PolicyLearner
from emlocal.backends.slots import SlotBackend, check_kv_type, passes
from emlocal.backends.torch.cache import Decoder
from emlocal.backends.torch.model import (
    Place,
    attach,
    can_pack,
    choose_place,
    linear_layers,
    load_model,
    out_of_memory,
    pack,
    packed_bytes,
    skeleton,
    trained_context,
)
from emlocal.backends.torch.sampler import TorchSampler
from emlocal.em.losses import PolicyObjective
from emlocal.errors import BackendError, CancelledError
from emlocal.files import read_json
from emlocal.machine import physical_cores
from emlocal.models.adapters import in_memory
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.folder import sampling_settings
from emlocal.models.gguf.header import GGUFHeader
from emlocal.models.tokenizer import Tokenizer as FolderTokenizer
from emlocal.text import counted

CPU_BUDGET, CUDA_BUDGET = 512, 4096
"""Tokens of a pass: enough to keep the device busy, and few enough to keep the activations small."""


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
        """Sets up the engine; see SlotBackend.

        `on_device_sampler`: None for the faster choice, the host's on CPUs; both draw the same tokens.
        """
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
            # a step ends before anybody could cancel it
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
                "set a smaller --parallel or --context",
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
                "set a smaller --context or --parallel",
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


class TorchModel(Opened):
    """A model in torch, to train or to make an engine of."""

    place: Place

    def backend(self, options: LoadOptions, *, on_device_sampler: bool | None = None) -> TorchBackend:
        return TorchBackend(
            self.model, self.tokenizer, self.info, options, self.place, on_device_sampler=on_device_sampler
        )

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        return linear_layers(self.model)

    def entropy_learner(
        self, adapter: Adapter, descent: Descent, objective: EntropyObjective, *, checkpointing: bool
    ) -> EntropyLearner:
        from emlocal.backends.torch.learner import TorchEntropyLearner

        return TorchEntropyLearner(self.model, adapter, descent, objective, checkpointing=checkpointing)

    def policy_learner(
        self,
        adapter: Adapter,
        descent: Descent,
        objective: PolicyObjective,
        *,
        temperature: float,
        checkpointing: bool,
    ) -> PolicyLearner:
        from emlocal.backends.torch.learner import TorchPolicyLearner

        return TorchPolicyLearner(
            self.model, adapter, descent, objective, temperature=temperature, checkpointing=checkpointing
        )


def open_model(
    folder: Path, *, name: str = "", device: str = "auto", dtype: str = "auto", threads: int | None = None
) -> TorchModel:
    """Loads the model in `folder`. `name`: what people call it; `threads`: CPU threads, from now on.

    Raises ModelError for a folder that cannot be used, UsageError for an unknown device or format.
    """
    place = choose_place(device, dtype)
    if threads is not None:
        torch.set_num_threads(threads)
    config = read_json(folder / "config.json")
    tokenizer = FolderTokenizer(folder)
    info = ModelInfo(
        name=name or folder.name,
        architecture=str(config.get("model_type", "")),
        vocabulary=tokenizer.vocabulary,
        trained_context=trained_context(config),
        end_tokens=tokenizer.end_tokens,
        chat_template=tokenizer.chat_template,
        tool_template=tokenizer.tool_template,
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        sampling=sampling_settings(folder),
    )
    return TorchModel(load_model(folder, place.device, place.dtype), tokenizer, info, place)


def open_folder(
    folder: Path,
    options: LoadOptions,
    *,
    name: str = "",
    base: GGUFHeader | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_device_sampler: bool | None = None,
) -> TorchBackend:
    """Returns the engine on the model in `folder`, with its adapters.

    Args:
        name: what people call it.
        base: header of the GGUF model that the folder was unpacked from; adapters in GGUF need it.
        on_device_sampler: see TorchBackend.

    Raises ModelError for a folder or adapter that cannot be used, UsageError for bad options; if possible
    before the weights are loaded.
    """
    check_kv_type("torch", options.kv_type, choose_place(device, dtype).format)
    adapters = [_scaled(in_memory(adapter, base), scale) for adapter, scale in options.adapters]
    if adapters:
        layers = skeleton(folder)
        for adapter in adapters:
            attach(layers, adapter)
    opened = open_model(folder, name=name, device=device, dtype=dtype)
    for adapter in adapters:
        attach(opened.model, adapter, opened.place.dtype)
    if can_pack(opened.place.device, opened.place.dtype):
        pack(opened.model)
    return opened.backend(options, on_device_sampler=on_device_sampler)


def _scaled(adapter: Adapter, scale: float) -> Adapter:
    pairs = {name: replace(pair, scale=pair.scale * scale) for name, pair in adapter.pairs.items()}
    return Adapter(pairs, adapter.base_model)
