"""An engine that passes every call on to another one; its subclasses change some."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from emlocal.backends.base import Backend, Feed, Row
from emlocal.sampling import Draw


class Delegating(Backend):
    """See the module. `Backend` describes the methods."""

    def __init__(self, engine: Backend) -> None:
        self._engine = engine
        self.info, self.context, self.max_sequences = engine.info, engine.context, engine.max_sequences
        self.rewinds = engine.rewinds

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return self._engine.encode(text, add_special=add_special, parse_special=parse_special)

    def least_tokens(self, text: str) -> int:
        return self._engine.least_tokens(text)

    def control_texts(self) -> Sequence[str]:
        return self._engine.control_texts()

    def token_bytes(self, token: int) -> bytes:
        return self._engine.token_bytes(token)

    def open(self) -> int:
        return self._engine.open()

    def release(self, sequence: int) -> None:
        self._engine.release(sequence)

    def length(self, sequence: int) -> int:
        return self._engine.length(sequence)

    def fork(self, sequence: int) -> int:
        return self._engine.fork(sequence)

    def trim(self, sequence: int, length: int) -> int:
        return self._engine.trim(sequence, length)

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        self._engine.forward(feeds, cancelled)

    def sample(self, rows: Sequence[Row]) -> list[Draw]:
        return self._engine.sample(rows)

    def logits(self, sequence: int, back: int = 0) -> NDArray[np.float32]:
        return self._engine.logits(sequence, back)

    def describe(self) -> str:
        return self._engine.describe()

    @property
    def arithmetic(self) -> str:
        return self._engine.arithmetic

    def memory_bytes(self) -> int:
        return self._engine.memory_bytes()

    def close(self) -> None:
        self._engine.close()
