"""The processor for vLLM's V2 runner, the one on GPUs.

    vllm serve MODEL --logits-processors emlocal_vllm.v2:EMProcessor

It runs where emlocal's EM step does: after biases, penalties and the grammar's mask, before temperature.
With speculative decoding there is a row for each draft token, and the step is taken on each.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

from emlocal_vllm.request import read
from emlocal_vllm.ring import ring_of
from emlocal_vllm.table import Table

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcRequestState


class EMProcessor(LogitsProcessor):
    """EM-INF, adaptive temperature and emlocal's draw, for the requests that ask for them."""

    def __init__(self, vllm_config: "VllmConfig", req_states: "LogitsProcRequestState") -> None:
        self._states = req_states
        device = torch.device(req_states.device)
        self._table = Table(req_states.max_num_reqs, device, ring_of(device))

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Raises ValueError for fields that are out of range. Runs in the front end: HTTP 400."""
        read(sampling_params)

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Places a request in a slot, over whatever was there."""
        request = read(sampling_params)
        self._table.put(req_idx, request)
        return request.wanted

    def apply_staged_writes(self) -> None:
        """Sends new settings to the device."""
        self._table.flush()

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """Takes the requests' steps, in place."""
        slots = ctx.idx_mapping_np.astype("int64")
        if not self._table.any(slots):
            return logits
        of_rows = ctx.expanded_idx_mapping.long()
        token = ctx.pos.long() + 1 - self._states.prompt_len.gpu[of_rows].long()
        drafts = len(of_rows) != len(slots)
        return self._table.step(logits, slots, of_rows if drafts else None, token)
