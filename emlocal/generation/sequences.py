"""The engine's sequences: those that are kept so that nothing is read twice, and which number each gets.

A finished sequence stays until its room is needed; the one that nobody has used for the longest goes first.
Engines compute sequences in one pass only where their numbers follow in order, or nearly, so numbers count
where each sequence has room of its own.
"""

from array import array
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from emlocal.backends.base import Backend
from emlocal.errors import BackendError
from emlocal.generation.runner import Handle, Job
from emlocal.generation.sample import Sample

WORTH_SHARING = 16
"""Tokens that a copy must save: engines whose sequences have room of their own copy all of it."""
_FIRST_BLOCK = 16  # tokens that are compared at first; most prompts part there, or not at all

Tokens = array  # of C ints: these are compared as fast as memory is read


def tokens_of(tokens: Sequence[int]) -> "Tokens[int]":
    """The tokens as they are kept and compared."""
    return array("i", tokens)


def common(a: "Tokens[int]", b: "Tokens[int]", most: int | None = None) -> int:
    """How many tokens two runs begin with alike, `most` at most."""
    n = min(len(a), len(b)) if most is None else min(len(a), len(b), most)
    start, size = 0, _FIRST_BLOCK
    while start < n:
        end = min(n, start + size)
        if a[start:end] != b[start:end]:
            break
        start, size = end, 2 * size
    else:
        return n
    while end - start > 1:  # they part between the two
        middle = (start + end) // 2
        if a[start:middle] == b[start:middle]:
            start = middle
        else:
            end = middle
    return start


class Group(Handle):
    """A job being worked on: its prompt, and the samples that have not begun."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.tokens = tokens_of(job.prompt)
        self.waiting = deque(
            Sample(i, request, job.prompt) for i, request in enumerate(job.requests, job.first_sample)
        )
        self.sequence: int | None = None
        """Holds the first `read` tokens of the prompt. The last sample takes it over."""
        self.read = 0
        self.admitted = self.first_draw = 0.0

    @property
    def unread(self) -> int:
        """Tokens that are to be read before the samples begin: all but the last."""
        return len(self.tokens) - 1 - self.read


@dataclass(eq=False)
class Stream:
    """A sample being decoded."""

    group: Group
    sample: Sample
    sequence: int
    next_token: int

    @property
    def held(self) -> int:
        """Tokens in its sequence between two steps."""
        return len(self.group.tokens) - 1 + len(self.sample.completion.draws)


@dataclass(eq=False)
class Kept:
    """A sequence that nobody decodes, and the tokens in it."""

    sequence: int
    tokens: "Tokens[int]"
    session: Hashable | None = None


class Sequences:
    """Opens, copies and keeps sequences."""

    def __init__(
        self,
        backend: Backend,
        parallel: int,
        roomy: bool,
        reading: Sequence[Group],
        streams: Sequence[Stream],
    ) -> None:
        """`roomy`: there are more than `parallel` samples and the root need. The last two are the scheduler's
        own lists, which change."""
        self.root: Kept | None = None
        """What consecutive prompts begin with, in a run."""
        self._backend, self._roomy = backend, roomy
        self._reading, self._streams = reading, streams
        self._numbers_matter = parallel > 1
        self._kept: list[Kept] = []  # the least recently used first
        self._freed: list[int] = []  # numbers that streams have left since the ranks were closed

    # ---------------------------------------------------------------------------------- what is kept

    def keep(self, kept: Kept) -> None:
        """Keep a sequence as far as the engine really holds these tokens; release one that is empty."""
        del kept.tokens[self._backend.length(kept.sequence) :]
        if kept.tokens:
            self._kept.append(kept)
        else:
            self._backend.release(kept.sequence)

    def at(self, sequence: int | None) -> Kept | None:
        """The kept one of this number."""
        return next((kept for kept in self._kept if kept.sequence == sequence), None)

    def longest(self, group: Group) -> tuple[int, int | None]:
        """The longest beginning of a prompt that a sequence holds, except the root, and that sequence."""
        length, kept = _longest(self._kept[::-1], group)  # the last used of equal ones
        best = length, None if kept is None else kept.sequence
        return max(best, self.longest_running(group), key=lambda pair: pair[0])

    def longest_running(self, group: Group) -> tuple[int, int | None]:
        """The same among those that are being read and decoded."""
        most = len(group.tokens) - 1
        found: tuple[int, int | None] = (0, None)
        for other in self._reading:
            if other.sequence is not None:
                length = common(other.tokens, group.tokens, min(most, other.read))
                found = max(found, (length, other.sequence), key=lambda pair: pair[0])
        for stream in self._streams:
            length = common(stream.group.tokens, group.tokens, most)
            if length == len(stream.group.tokens):
                said = tokens_of(stream.sample.completion.tokens)
                length += common(said, group.tokens[length:most])
            found = max(found, (min(length, stream.held), stream.sequence), key=lambda pair: pair[0])
        return found

    def of_session(self, group: Group) -> tuple[int, Kept | None]:
        """The same among what is kept of the job's session; the first of equal ones."""
        return _longest(self._of(group.job.session), group)

    def _of(self, session: Hashable | None) -> list[Kept]:
        return [kept for kept in self._kept if session is not None and kept.session == session]

    def take(self, kept: Kept) -> int:
        """Its sequence, which is no longer kept; others of its session are dropped."""
        self._kept.remove(kept)
        for other in self._of(kept.session):
            self._drop(other)
        return kept.sequence

    def make_room(self) -> bool:
        """Drop what nobody has used for the longest, and the root last; False where there is nothing."""
        if self._drop_oldest():
            return True
        if self.root is None:
            return False
        self.give_up_root()
        return True

    def in_root(self, prompt: "Tokens[int]", most: int) -> int:
        """How many tokens of the prompt the root holds."""
        return 0 if self.root is None else common(self.root.tokens, prompt, most)

    def start_root(self, tokens: "Tokens[int]", donor: int | None) -> Kept:
        """The root with nothing but these tokens, which `donor` begins with; with those of them that it has
        already where there is no donor."""
        if self.root is None or donor is not None:
            self.give_up_root()
            self.root = Kept(self.open() if donor is None else self.copy(donor), tokens)
        length = min(len(tokens), self._backend.length(self.root.sequence))
        self.root.tokens = tokens[: self._backend.trim(self.root.sequence, length)]
        return self.root

    def give_up_root(self) -> None:
        """Release the root's sequence."""
        if self.root is not None:
            self._backend.release(self.root.sequence)
            self.root = None

    def clear(self) -> None:
        """Drop all that is kept."""
        while self._drop_oldest():
            pass

    def _drop(self, kept: Kept) -> None:
        self._kept.remove(kept)
        self._backend.release(kept.sequence)

    def _drop_oldest(self, spared: Kept | None = None) -> bool:
        oldest = next((kept for kept in self._kept if kept is not spared), None)
        if oldest is not None:
            self._drop(oldest)
        return oldest is not None

    # ------------------------------------------------------------------------------- numbers in order

    def open(self) -> int:
        """A new sequence. Raises BackendError where all are in use."""
        return self._number(self._backend.open, None)

    def copy(self, source: int | None) -> int:
        """A copy of a sequence; itself, if it is kept and there is no room for another.

        Raises BackendError where all are in use.
        """
        assert source is not None
        kept = self.at(source)
        if kept is not None:  # others are less recently used now
            self._kept.remove(kept)
            self._kept.append(kept)
        try:
            return self._number(lambda: self._backend.fork(source), kept)
        except BackendError:
            if kept is None:
                raise
            return self.take(kept)

    def _number(self, make: Callable[[], int], spared: Kept | None) -> int:
        self._make_way(spared)
        while True:
            try:
                return make()
            except BackendError:
                if not self._drop_oldest(spared):
                    raise

    def _make_way(self, spared: Kept | None) -> None:
        """Before a sequence gets the smallest free number: drop what is kept where it leaves a gap then.

        In a run what is decoded has the smallest numbers; else it is enough that nothing lies between. Where
        there is room to keep it elsewhere, `close_ranks` does that.
        """
        fed = self._numbers()
        if not self._numbers_matter or self._roomy or not (fed or self.root):
            return
        used = {*fed, *(kept.sequence for kept in (self.root, *self._kept) if kept)}
        new = next(number for number in range(len(used) + 1) if number not in used)
        low, high = (-1, new) if self.root else (min(fed), max(new, *fed))
        within = [k for k in self._kept if low < k.sequence < high and k is not spared]
        if within:
            self._drop(min(within, key=lambda kept: kept.sequence) if self.root else within[0])

    def left(self, sequence: int) -> None:
        """A stream has this number no more."""
        if self._numbers_matter:
            self._freed.append(sequence)

    def _numbers(self) -> list[int]:
        """Of the sequences that are fed."""
        reading = [group.sequence for group in self._reading if group.sequence is not None]
        return [stream.sequence for stream in self._streams] + reading

    def close_ranks(self) -> None:
        """Move streams into numbers that nobody has taken: in a run into all that are free, else into those
        that lie between others.

        Without it the last samples of a run, with gaps between them, would take a pass each.
        """
        if not self._freed:
            return
        gaps, self._freed = self._freed, []
        fed = self._numbers()
        held = {*fed} | ({self.root.sequence} if self.root else set())
        for gap in gaps if self.root else range(min(fed, default=0), max(fed, default=0)):
            last = max(self._streams, key=lambda stream: stream.sequence, default=None)
            if gap in held or last is None or last.sequence < gap:
                continue
            kept = self.at(gap)
            if kept is not None:
                self._move_away(kept)
            copy = self._backend.fork(last.sequence)
            if copy < last.sequence:
                last.sequence, copy = copy, last.sequence
            self._backend.release(copy)

    def _move_away(self, kept: Kept) -> None:
        """Free the number of a sequence that is kept; it gets another where there is room for keeping."""
        if self._roomy:
            with suppress(BackendError):  # all numbers are taken
                copy = self._backend.fork(kept.sequence)
                self._backend.release(kept.sequence)
                kept.sequence = copy
                return
        self._drop(kept)


def _longest(some: Sequence[Kept], group: Group) -> tuple[int, Kept | None]:
    found: tuple[int, Kept | None] = (0, None)
    for kept in some:
        length = common(kept.tokens, group.tokens, len(group.tokens) - 1)
        if found[1] is None or length > found[0]:
            found = length, kept
    return found
