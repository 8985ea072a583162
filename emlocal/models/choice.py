"""Which models of the catalogue fit a machine, and which one `-m auto` takes: arithmetic on sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from emlocal.models.memory import PROCESS_BYTES
from emlocal.models.offload import SPARE_BYTES, Offload, even_sizes, plan
from emlocal.models.resolve import CatalogEntry, candidates

AUTO = "auto"
"""The name of the model that fits best."""
CONTEXT = 8192
"""Tokens that a model must have room for."""
BUFFER_BYTES = 400_000_000
"""Allowance for a computation's buffers, of which the catalogue knows nothing."""


@dataclass(frozen=True)
class Room:
    """The memory that models may take, in bytes."""

    memory: int
    """Free main memory."""
    gpus: tuple[int, ...] = ()
    """Free memory of each GPU that has its own."""


@dataclass(frozen=True)
class Fit:
    """How a model fits a machine."""

    fits: bool
    needed: int
    """Bytes of main memory."""
    offload: Offload
    layers: int
    """All layers, with the output as one."""

    def describe(self) -> str:
        """Returns "yes", "no", or how much of it a GPU takes."""
        if not self.fits:
            return "no"
        if not self.offload.layers:
            return "yes"
        whole = self.offload.layers == self.layers
        return "on the GPU" if whole else f"yes, {self.offload.layers} of {self.layers} layers on the GPU"


def fit(entry: CatalogEntry, room: Room, tokens: int = CONTEXT) -> Fit:
    """Returns how a model of the catalogue, with a context of `tokens`, fits a machine."""
    cache = entry.kv * tokens
    free = [max(0, gpu - SPARE_BYTES - BUFFER_BYTES) for gpu in room.gpus]
    offload = plan(even_sizes(entry.bytes, entry.layers, cache), free)
    needed = max(0, entry.bytes + cache - sum(offload.held)) + BUFFER_BYTES + PROCESS_BYTES
    return Fit(needed <= room.memory, needed, offload, entry.layers + 1)


def best(room: Room, entries: Sequence[CatalogEntry] | None = None) -> CatalogEntry | None:
    """Returns the first candidate that fits; None if none does."""
    return next(filter(partial(_fits, room), candidates() if entries is None else entries), None)


def _fits(room: Room, entry: CatalogEntry) -> bool:
    return fit(entry, room).fits
