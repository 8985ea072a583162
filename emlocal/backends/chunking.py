"""Cutting the feeds of one call into forward passes, so that little is computed that nobody asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from emlocal.backends.base import Feed

ALIKE = 0.8
"""Chunks share a pass if the shortest is no shorter than this part of the longest; the rest is padding."""


@dataclass(frozen=True)
class Chunk:
    """Tokens of one sequence that one pass computes."""

    slot: int
    start: int
    """The position of the first."""
    tokens: Sequence[int]
    wanted: bool
    """Whether the logits after the last are wanted."""

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + len(self.tokens)


def passes(feeds: Sequence[Feed], lengths: Sequence[int], budget: int) -> Iterator[list[Chunk]]:
    """Passes of at most `budget` tokens, padding included, in an order in which they can be run.

    Args:
        lengths: tokens held by each feed's sequence before the call.
    """
    longest = max(len(feed.tokens) for feed in feeds)
    for i in range(0, longest, budget):
        chunks = [
            Chunk(
                feed.sequence,
                held + i,
                feed.tokens[i : i + budget],
                feed.wanted and i + budget >= len(feed.tokens),
            )
            for feed, held in zip(feeds, lengths, strict=True)
            if len(feed.tokens) > i
        ]
        yield from _of_similar_length(chunks, budget)


def _of_similar_length(chunks: list[Chunk], budget: int) -> Iterator[list[Chunk]]:
    """Groups with the longest first; within a group by slot, ascending."""
    group: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: (-len(chunk.tokens), chunk.slot)):
        longest = len(group[0].tokens) if group else 0
        if group and (len(chunk.tokens) < ALIKE * longest or (len(group) + 1) * longest > budget):
            yield sorted(group, key=lambda chunk: chunk.slot)
            group = []
        group.append(chunk)
    yield sorted(group, key=lambda chunk: chunk.slot)
