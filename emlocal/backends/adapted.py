"""Several LoRA adapters on one loaded model, of which one computes in each pass.

An engine that can change adapters between two passes is an `Adapting`. An `AdapterView` is a backend that
computes with one of them: its sequences belong to that adapter, because attention state comes from its
weights. All views draw on the engine's sequences.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emlocal.backends.base import Backend, Feed, Row
from emlocal.errors import BackendError
from emlocal.sampling import Draw


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


class AdapterView(Backend):
    """An engine with one of its adapters."""

    def __init__(self, engine: Adapting, number: int | None) -> None:
        """`number`: of the adapter; None: the model without."""
        self._engine, self._number = engine, number
        self.info, self.context, self.max_sequences = engine.info, engine.context, engine.max_sequences
        self.make_room: Callable[[], bool] = lambda: False
        """Called if all sequences are in use: releases one of another view, or returns False."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return self._engine.encode(text, add_special=add_special, parse_special=parse_special)

    def least_tokens(self, text: str) -> int:
        return self._engine.least_tokens(text)

    def control_texts(self) -> Sequence[str]:
        return self._engine.control_texts()

    def token_bytes(self, token: int) -> bytes:
        return self._engine.token_bytes(token)

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

    def release(self, sequence: int) -> None:
        self._engine.release(sequence)

    def length(self, sequence: int) -> int:
        return self._engine.length(sequence)

    def trim(self, sequence: int, length: int) -> int:
        return self._engine.trim(sequence, length)

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        self._engine.choose_adapter(self._number)
        self._engine.forward(feeds, cancelled)

    def sample(self, rows: Sequence[Row]) -> list[Draw]:
        return self._engine.sample(rows)

    def logits(self, sequence: int) -> NDArray[np.float32]:
        return self._engine.logits(sequence)

    def describe(self) -> str:
        return self._engine.describe()

    @property
    def arithmetic(self) -> str:
        return self._engine.arithmetic

    def memory_bytes(self) -> int:
        return self._engine.memory_bytes()

    def close(self) -> None:
        """Does nothing: the engine belongs to whoever loaded it."""
