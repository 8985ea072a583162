"""Several LoRA adapters on one loaded model, of which one computes in each pass.

An engine that can change adapters between two passes is an `Adapting`. An `AdapterView` is a backend that
computes with one of them: its sequences belong to that adapter, because attention state comes from its
weights. All views draw on the engine's sequences.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from emlocal.backends.base import Backend, Feed
from emlocal.backends.delegating import Delegating
from emlocal.errors import BackendError


class Adapting(Backend):
    """An engine that holds adapters and chooses among them for each pass."""

    @abstractmethod
    def add_adapter(self, path: Path, scale: float) -> int:
        """Loads an adapter, and returns its number. Raises ModelError if it cannot be used."""

    @abstractmethod
    def choose_adapter(self, number: int | None) -> None:
        """Computes with this adapter from now on, beside those of `LoadOptions`; None: without.

        The caller feeds a sequence with the adapter of its earlier tokens only.
        """


class AdapterView(Delegating):
    """An engine with one of its adapters."""

    def __init__(self, engine: Adapting, number: int | None) -> None:
        """`number`: of the adapter; None: the model without."""
        super().__init__(engine)
        self._adapting, self._number = engine, number
        self.make_room: Callable[[], bool] = lambda: False
        """Called if all sequences are in use: releases one of another view, or returns False."""

    def open(self) -> int:
        return self._number_of(self._engine.open)

    def fork(self, sequence: int) -> int:
        return self._number_of(lambda: self._engine.fork(sequence))

    def _number_of(self, make: Callable[[], int]) -> int:
        while True:
            try:
                return make()
            except BackendError:
                if not self.make_room():
                    raise

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        self._adapting.choose_adapter(self._number)
        self._engine.forward(feeds, cancelled)

    def close(self) -> None:
        """Does nothing: the engine belongs to whoever loaded it."""
