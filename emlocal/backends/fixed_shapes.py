"""An engine whose answers do not depend on who else is served: each row comes from a pass of its own.

The last bits of a sum depend on the shape of the pass in which it is computed: on the number of its rows, and
on how they are grouped. Therefore

- a single step is a pass of one token of one sequence;
- a prompt is read in parts of `PART` tokens, cut at the same positions whatever came before; its last part
  is shorter. A part is a pass of its own;
- a sequence is continued only up to its last whole part. What was computed otherwise, in a shorter part or
  step by step, is computed again, as it is for a request that comes first.

So a row is a function of the tokens before it, to the last bit, if the engine gives the same pass the same
bits and keeps its sequences apart. It costs the passes that are shared otherwise (docs/serving.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from emlocal.backends.base import Backend, Feed, Row, check_feeds, check_length
from emlocal.backends.delegating import Delegating
from emlocal.errors import UsageError
from emlocal.sampling import Draw, Sampler

PART = 64
"""Tokens of a whole part. Larger parts read faster; smaller ones let later prompts reuse more."""


@dataclass
class _Held:
    """The tokens of a sequence beyond those that the engine holds, and what it computed in whole parts."""

    whole: int = 0
    """Tokens at the beginning that were computed in whole parts."""
    waiting: list[int] = field(default_factory=list)
    """Tokens of a part that is not whole yet. They are computed when it is, or when a row is needed."""


class FixedShapes(Delegating):
    """See the module. The engine's sequences must not share memory."""

    def __init__(self, engine: Backend) -> None:
        super().__init__(engine)
        self.rewinds = False  # a token that was guessed would be a step of another shape
        self._held: dict[int, _Held] = {}
        self._rows: dict[int, NDArray[np.float32]] = {}
        self._sampler = Sampler(engine.info.vocabulary)

    def open(self) -> int:
        sequence = self._engine.open()
        self._held[sequence] = _Held()
        return sequence

    def release(self, sequence: int) -> None:
        self._engine.release(sequence)
        del self._held[sequence]
        self._rows.pop(sequence, None)

    def length(self, sequence: int) -> int:
        return self._engine.length(sequence) + len(self._held[sequence].waiting)

    def fork(self, sequence: int) -> int:
        copy = self._engine.fork(sequence)
        self._held[copy] = self._copy(sequence)
        return copy

    def trim(self, sequence: int, length: int) -> int:
        """Cuts at the end of a whole part, even if the sequence is not longer than `length`."""
        own = self._held[sequence]
        if self._engine.length(sequence) > own.whole or length < own.whole:
            own.waiting.clear()
            kept = min(own.whole, length) // PART * PART
            own.whole = self._engine.trim(sequence, kept) // PART * PART
            self._engine.trim(sequence, own.whole)
        else:
            del own.waiting[length - own.whole :]
        return self.length(sequence)

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        check_feeds(feeds, self.info.vocabulary)
        for feed in feeds:
            check_length(self.length(feed.sequence), len(feed.tokens), self.context)
        before = {
            feed.sequence: (self._engine.length(feed.sequence), self._copy(feed.sequence)) for feed in feeds
        }
        rows: dict[int, NDArray[np.float32]] = {}
        try:
            for feed in feeds:
                self._feed(feed, rows, cancelled)
        except BaseException:
            for sequence, (length, held) in before.items():
                back = self._engine.trim(sequence, length) == length
                self._held[sequence] = held if back else _Held()
                if not back:
                    self._engine.trim(sequence, 0)
            raise
        self._rows = rows

    def _copy(self, sequence: int) -> _Held:
        own = self._held[sequence]
        return _Held(own.whole, [*own.waiting])

    def _feed(self, feed: Feed, rows: dict[int, NDArray[np.float32]], cancelled: Callable[[], bool]) -> None:
        """Computes what of a sequence is a whole part, and the rest if its row is wanted."""
        own, sequence = self._held[feed.sequence], feed.sequence
        stepping = self._engine.length(sequence) > own.whole or (feed.wanted and len(feed.tokens) == 1)
        if stepping:  # a prompt has ended: what waits is its last part, and every token is a step
            if own.waiting:
                self._engine.forward([Feed(sequence, own.waiting, wanted=False)], cancelled)
                own.waiting = []
            for i, token in enumerate(feed.tokens, 1):
                last = i == len(feed.tokens) and feed.wanted > 0
                self._engine.forward([Feed(sequence, [token], last)], cancelled)
        else:
            own.waiting += feed.tokens
            while len(own.waiting) >= PART:
                last = feed.wanted > 0 and len(own.waiting) == PART
                self._engine.forward([Feed(sequence, own.waiting[:PART], last)], cancelled)
                del own.waiting[:PART]
                own.whole += PART
            if feed.wanted and own.waiting:
                self._engine.forward([Feed(sequence, own.waiting)], cancelled)
                own.waiting = []
        if feed.wanted:
            rows[sequence] = self._engine.logits(sequence)

    def sample(self, rows: Sequence[Row]) -> list[Draw]:
        return [self._sampler.sample(self._rows[r.sequence], r.params, r.u, r.seen, r.legal) for r in rows]

    def logits(self, sequence: int, back: int = 0) -> NDArray[np.float32]:
        if back:
            raise KeyError(back)
        return self._rows[sequence].copy()

    def describe(self) -> str:
        return f"{self._engine.describe()}, each row in a pass of its own"

    @property
    def arithmetic(self) -> str:
        return f"{self._engine.arithmetic}, fixed shapes"


def fixed_shapes(engine: Backend) -> FixedShapes:
    """Returns the engine with fixed shapes. Raises UsageError for engines on which they are not tested."""
    if engine.name != "llama.cpp":
        raise UsageError(f"--deterministic is not tested with {engine.name}", "use --backend llama.cpp")
    return FixedShapes(engine)
