"""Exact entropies of tokens, kept on the device until somebody reads them (`worker.Entropies`).

A request with `em_record` and `em_id` has one record for each token. The ring holds the last `RECORDS`; a
long run reads it between its batches. Two records of one token are the same: a prompt that is read in parts
has a row for its first token in each, and a preempted request is computed again.
"""

import torch
from torch import Tensor

from emlocal_vllm.steps import Entropies

RECORDS = 1 << 17
"""Records: 6 MB."""


class Ring:
    """The last records of a device."""

    def __init__(self, device: torch.device, records: int = RECORDS) -> None:
        self._addresses = torch.zeros((records, 3), dtype=torch.int64, device=device)
        self._numbers = torch.zeros((records, 3), dtype=torch.float64, device=device)
        self._next = 0
        self._full = False

    def add(self, key: Tensor, sample: Tensor, token: Tensor, found: Entropies) -> None:
        """Adds a record for each row; key, sample and token are int64 [R]."""
        size, n = len(self._numbers), len(key)
        at = (torch.arange(n, device=key.device) + self._next) % size
        self._addresses.index_copy_(0, at, torch.stack([key, sample, token], dim=-1))
        self._numbers.index_copy_(0, at, torch.cat([*found], dim=-1))
        self._full = self._full or self._next + n >= size
        self._next = (self._next + n) % size

    def read(self) -> list[tuple[int, int, int, float, float, int]]:
        """Returns (key, sample, token, entropy before, after, steps) of each record; waits for the device.

        Key 0, of requests without `em_id`, is left out.
        """
        records = len(self._numbers) if self._full else self._next
        order = torch.arange(records)
        if self._full:
            order = (order + self._next) % records
        addresses, numbers = self._addresses.cpu()[order].tolist(), self._numbers.cpu()[order].tolist()
        return [
            (key % (1 << 64), sample, token, before, after, int(steps))
            for (key, sample, token), (before, after, steps) in zip(addresses, numbers, strict=True)
            if key
        ]

    def clear(self) -> None:
        """Forgets all records."""
        self._next, self._full = 0, False


RINGS: dict[str, Ring] = {}
"""The ring of each device of this process. The worker's extension has no other way to the processor."""


def ring_of(device: torch.device) -> Ring:
    """Returns the ring of a device."""
    return RINGS.setdefault(str(device), Ring(device))
