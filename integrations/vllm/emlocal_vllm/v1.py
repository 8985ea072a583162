"""The processor for vLLM's V1 runner, the one on CPUs.

    vllm serve MODEL --logits-processors emlocal_vllm.v1:EMProcessor

It runs before penalties, which is not emlocal's order. So a request that has both is refused. It runs before
temperature, after biases and the grammar's mask.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor, MoveDirectionality

from emlocal_vllm.request import read, refuse_penalties
from emlocal_vllm.ring import ring_of
from emlocal_vllm.table import Table, token_index

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class EMProcessor(LogitsProcessor):
    """EM-INF, adaptive temperature and emlocal's draw, for the requests that ask for them."""

    def __init__(self, vllm_config: "VllmConfig", device: torch.device, is_pin_memory: bool) -> None:
        slots = vllm_config.scheduler_config.max_num_seqs
        device = torch.device(device)
        self._table = Table(slots, device, ring_of(device))
        self._outputs: list[list[int]] = [[] for _ in range(slots)]  # vLLM's lists, which grow

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Raises ValueError for fields that are out of range. Runs in the front end: HTTP 400."""
        refuse_penalties(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """Returns False: such processors run before temperature, and for greedy requests, too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follows the requests through the batch: removed, then added, then moved."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._put(index, None, [])
        for index, params, _, outputs in batch_update.added:
            self._put(index, params, outputs)
        for source, target, direction in batch_update.moved:
            swap = direction is MoveDirectionality.SWAP
            self._table.move(source, target, swap=swap)
            kept = self._outputs[target] if swap else []
            self._outputs[target], self._outputs[source] = self._outputs[source], kept
        self._table.flush()

    def _put(self, index: int, params: Any, outputs: list[int]) -> None:
        self._outputs[index] = outputs
        if params is None:
            self._table.clear(index)
        else:
            self._table.put(index, read(params))

    def apply(self, logits: Tensor) -> Tensor:
        """Takes the requests' steps, in place."""
        slots = np.arange(len(logits))
        if not self._table.any(slots):
            return logits
        lengths = list(map(len, self._outputs[: len(logits)]))
        return self._table.step(logits, slots, None, token_index(lengths, logits.device))
