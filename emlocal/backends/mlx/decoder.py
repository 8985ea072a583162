"""Forward passes of an mlx-lm model over chunks of several sequences.

mlx-lm's own BatchGenerator draws with one global random state, gives no statistics, and decides itself when
rows come and go; so the model and the cache are driven directly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module

from emlocal.backends.chunking import Chunk
from emlocal.backends.mlx.cache import MLXCache, Window
from emlocal.backends.mlx.model import windows
from emlocal.errors import ModelError

_UNLIKE = 0.3
"""Standard deviations of the logits. Rounding in bfloat16 makes 0.1, another computation more than 1."""
GAP = 2
"""Decoding computes gaps between slots too, each up to this many times the rows asked for."""


class Decoder:
    """A causal language model and the cache that it reads and writes.

    Raises ModelError for a model that keeps its state elsewhere than in a cache of keys and values.
    """

    def __init__(self, model: Module) -> None:
        self._model: Any = model  # mlx-lm's models have no static types
        self.reach = windows(model)
        self.cache = MLXCache(self.reach)

    def read(self, chunks: Sequence[Chunk], cancelled: Callable[[], bool]) -> None:
        """Compute the chunks, of different slots in ascending order, and store their keys and values.

        Raises CancelledError.
        """
        for rows in _ranges(chunks):
            self._run(rows, cancelled)
            mx.eval(self.cache.arrays)

    def step(self, chunks: Sequence[Chunk]) -> mx.array:
        """The same for one token a slot, and the logits after it, float32 [chunks, V], computed."""
        parts = []
        for rows in _ranges(chunks):
            asked = [i for i, chunk in enumerate(rows) if chunk.tokens]  # the others only fill a gap
            logits = self._run(rows, None)[:, -1]
            parts.append(logits if len(asked) == len(rows) else logits[mx.array(asked)])
        found = (parts[0] if len(parts) == 1 else mx.concatenate(parts)).astype(mx.float32)
        mx.eval(found, self.cache.arrays)
        return found

    def _run(self, rows: Sequence[Chunk], cancelled: Callable[[], bool] | None) -> mx.array:
        """[rows, T, V], not computed yet. The rows' slots follow in order.

        Padding is on the right, at the positions that follow, so that it sees something; it is not kept.
        """
        width = max(len(chunk.tokens) for chunk in rows)
        length = max(chunk.stop for chunk in rows)
        whole = all(chunk.stop == length and len(chunk.tokens) == width for chunk in rows)
        starts = np.array([chunk.start for chunk in rows], dtype=np.int32)
        ids = np.zeros((len(rows), width), dtype=np.int32)
        cells = np.full((len(rows), width), self.cache.capacity, dtype=np.int32)
        for i, chunk in enumerate(rows):
            ids[i, : len(chunk.tokens)] = chunk.tokens
            cells[i, : len(chunk.tokens)] = range(chunk.start, chunk.stop)
        window = Window(
            slots=range(rows[0].slot, rows[-1].slot + 1),
            cells=None if whole else mx.array(cells),
            offsets=int(starts[0]) if whole else mx.array(starts),
            positions=mx.array(starts[:, None] + np.arange(width, dtype=np.int32)),
            length=length,
            cancelled=cancelled,
        )
        self.cache.begin(window)
        logits: mx.array = self._model(mx.array(ids), cache=self.cache.layers)
        return logits

    def check(self) -> None:
        """Compute five tokens with the cache, in rows of different lengths, and without: do they agree?

        Raises ModelError where the logits differ, or where layers did not use the cache.
        """
        name = type(self._model).__module__.rpartition(".")[2]
        tokens = list(range(5))
        expected = self._model(mx.array([tokens]))[0, -1].astype(mx.float32)
        self.cache.reserve(2, len(tokens), len(tokens))
        self.read([Chunk(0, 0, tokens[:2], False), Chunk(1, 0, tokens[:3], False)], lambda: False)
        self.read([Chunk(0, 2, tokens[2:4], False)], lambda: False)
        got = self.step([Chunk(0, 4, tokens[4:], True), Chunk(1, 3, tokens[3:4], True)])[0]
        held, layers = len(self.cache.arrays), 2 * len(self.reach)
        self.cache.clear(0, 0, len(tokens))
        self.cache.clear(1, 0, len(tokens))
        if held != layers:
            raise ModelError(
                f"{name} is not for the mlx engine: {held // 2} of its {layers // 2} layers keep keys"
                " and values"
            )
        far = float(mx.sqrt(mx.mean(mx.square(got - expected))) / mx.std(expected))
        if not far < _UNLIKE:
            raise ModelError(
                f"{name} is not for the mlx engine: step by step its logits are off by {far:.2g}"
                " standard deviations"
            )


def _ranges(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Runs of slots in order, each for a pass of its own; small gaps between single tokens are filled.

    A row that is computed for nothing costs less than another pass over the weights; it writes nothing that
    is read.
    """
    single = all(len(chunk.tokens) == 1 for chunk in chunks)
    runs: list[list[Chunk]] = []
    for chunk in chunks:
        gap = chunk.slot - runs[-1][-1].slot - 1 if runs else -1
        if runs and (gap == 0 or (single and gap <= GAP * len(chunks))):
            last = runs[-1][-1].slot
            runs[-1] += [Chunk(slot, 0, (), False) for slot in range(last + 1, chunk.slot)]
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return runs
