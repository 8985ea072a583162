"""What the requests of a batch ask for, in columns on the device, and one step over the batch's rows.

Requests live in slots. Settings go to the device when a request comes or moves, not in each step. The rows of
a step are grouped by kernel, on the host, by slots alone; no step waits for the device, and none loops over
rows. Where the host does not know which request a row belongs to (drafts), each kernel sees all rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emlocal_vllm import draw
from emlocal_vllm.request import Request
from emlocal_vllm.ring import Ring
from emlocal_vllm.steps import Kernel, Scratch, Settings, sharpen

KERNELS: tuple[Kernel, ...] = ("none", "sgd", "full", "adam", "adaptive")
_NUMBERS = 9
Slots = NDArray[np.int64]


class Table:
    """The requests in the slots of a batch."""

    def __init__(self, slots: int, device: torch.device, ring: Ring | None = None) -> None:
        """Sets up empty slots. `ring`: where entropies are kept for requests that ask for it."""
        self.device = device
        self.ring = ring
        self._ask = device.type == "cpu"
        self._scratch = Scratch()
        # on the host: 0 if nothing is to be done, else 2 · kernel + draw + 1
        self._group = np.zeros(slots, dtype=np.int64)
        self._rounds = np.zeros(slots, dtype=np.int64)
        self._sorts = np.zeros(slots, dtype=bool)
        self._records = np.zeros(slots, dtype=bool)
        self._numbers = np.zeros((slots, _NUMBERS))
        self._keys = np.zeros((slots, 3), dtype=np.int64)
        self._on_host = (
            self._group,
            self._rounds,
            self._sorts,
            self._records,
            self._numbers,
            self._keys,
        )
        self._device_numbers = torch.zeros((slots, _NUMBERS), dtype=torch.float64, device=device)
        self._device_keys = torch.zeros((slots, 3), dtype=torch.int64, device=device)
        self._device_group = torch.zeros(slots, dtype=torch.int64, device=device)
        self._changed = False

    @property
    def draws(self) -> NDArray[np.bool_]:
        """Whether each slot's token index is needed: for draws and records."""
        needed: NDArray[np.bool_] = (self._group > 0) & ((self._group % 2 == 0) | self._records)
        return needed

    def put(self, slot: int, request: Request) -> None:
        """Places a request in a slot; whatever was there is gone."""
        kernel = KERNELS.index(request.kernel)
        self._group[slot] = 2 * kernel + request.draw + 1 if request.wanted else 0
        self._rounds[slot] = request.steps
        self._sorts[slot] = request.draw and (request.top_k > 0 or request.top_p < 1)
        self._records[slot] = request.record
        self._numbers[slot] = (
            *(request.threshold, request.steps, request.learning_rate, request.kl_weight, request.ratio),
            *(request.temperature, request.top_k, request.top_p, request.min_p),
        )
        self._keys[slot] = draw.signed(request.seed), draw.signed(request.key), request.sample
        self._changed = True

    def clear(self, slot: int) -> None:
        """Empties a slot."""
        self._group[slot] = 0
        self._changed = True

    def move(self, source: int, target: int, *, swap: bool) -> None:
        """Moves a request, or swaps two."""
        for column in self._on_host:
            if swap:
                column[[source, target]] = column[[target, source]]
            else:
                column[target] = column[source]
        if not swap:
            self._group[source] = 0
        self._changed = True

    def flush(self) -> None:
        """Copies what has changed to the device, without waiting for it."""
        if not self._changed:
            return
        self._changed = False
        for own, host in (
            (self._device_numbers, self._numbers),
            (self._device_keys, self._keys),
            (self._device_group, self._group),
        ):
            own.copy_(self._sent(host), non_blocking=True)

    def _sent(self, values: NDArray[np.generic]) -> Tensor:
        """Returns a copy on the host that may change after the transfer began."""
        copy = torch.from_numpy(values.copy())
        return copy.pin_memory() if self.device.type == "cuda" else copy

    def any(self, slots: Slots) -> bool:
        """Whether one of these slots has a request that asks for something."""
        return bool(self._group[slots].any())

    def step(self, logits: Tensor, slots: Slots, rows: Tensor | None, token: Tensor) -> Tensor:
        """Takes the requests' steps in place.

        Args:
            logits: float32 [rows, V].
            slots: slot of each request, on the host; of each row if `rows` is None.
            rows: slot of each row, on the device, if there are other rows than requests.
            token: index of each row's token in its answer, int64 [rows], on the device.
        Returns:
            `logits`.
        """
        groups = self._group[slots]
        for group in np.unique(groups[groups > 0]).tolist():
            members = slots[groups == group]
            kernel, draws = KERNELS[(group - 1) // 2], group % 2 == 0
            rounds, sorts = int(self._rounds[members].max()), bool(self._sorts[members].any())
            records = self.ring is not None and bool(self._records[members].any())
            if rows is not None:
                old = logits.clone()
                self._rows(logits, rows, token, kernel, rounds, draws, sorts, records)
                own = self._device_group[rows][:, None] == group
                logits.copy_(torch.where(own, logits, old))
            elif len(members) == len(slots):
                index = self._index(slots)
                self._rows(logits, index, token, kernel, rounds, draws, sorts, records)
            else:
                where, index = self._index(np.flatnonzero(groups == group)), self._index(members)
                part = logits[where]
                self._rows(part, index, token[where], kernel, rounds, draws, sorts, records)
                logits.index_copy_(0, where, part)
        return logits

    def _index(self, values: Slots) -> Tensor:
        return self._sent(values).to(self.device, non_blocking=True)

    def _rows(
        self,
        z: Tensor,
        slots: Tensor,
        token: Tensor,
        kernel: Kernel,
        rounds: int,
        draws: bool,
        sorts: bool,
        records: bool,
    ) -> None:
        """Takes the step of one kernel on rows, in place; then the draw."""
        columns = self._device_numbers[slots].T[..., None].unbind()
        found = sharpen(z, Settings(*columns[:5]), kernel, rounds, self._ask, self._scratch)
        seed, key, sample = self._device_keys[slots].unbind(-1)
        if records and self.ring is not None:
            self.ring.add(key, sample, token, found)
        if draws:
            u = draw.uniforms(seed, key, sample, token)[:, None]
            z.copy_(draw.only(z, draw.choose(z, u, *columns[5:9], ordered=sorts)))


def token_index(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Returns numbers of tokens as a tensor on the device."""
    return torch.tensor(lengths, dtype=torch.int64).to(device, non_blocking=True)
