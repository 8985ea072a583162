"""The engine's sequences: those kept so that nothing is read twice, and the number of each.

A finished sequence stays until its room is needed; the least recently used one goes first. Engines compute
sequences in one pass only if their numbers follow in order, or nearly. So numbers matter if each sequence has
room of its own.
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
from emlocal.generation.speculation import Guesser

WORTH_SHARING = 16
"""The fewest tokens that a copy must save, because engines with separate rooms copy the whole sequence."""
_FIRST_BLOCK = 16  # tokens compared at first; most prompts part there, or not at all

Tokens = array  # of C ints, which are compared as fast as memory is read


def tokens_of(tokens: Sequence[int]) -> "Tokens[int]":
    """Returns the tokens in the form in which they are kept and compared."""
    return array("i", tokens)


def common(a: "Tokens[int]", b: "Tokens[int]", most: int | None = None) -> int:
    """Returns the length of the common beginning of two runs of tokens, at most `most`."""
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
    """A job in progress: its prompt, and the samples that have not begun."""

    def __init__(self, job: Job, samples: Sequence[Sample]) -> None:
        """`samples`: one for each request, before its first token."""
        super().__init__(job)
        self.tokens = tokens_of(job.prompt)
        self.waiting = deque(samples)
        self.sequence: int | None = None
        """The sequence with the first `read` tokens of the prompt. The last sample takes it over."""
        self.read = 0
        self.guesser: Guesser | None = None
        self.admitted = self.first_draw = 0.0

    @property
    def unread(self) -> int:
        """Tokens to read before the samples begin: all but the last."""
        return len(self.tokens) - 1 - self.read


@dataclass(eq=False)
class Stream:
    """A sample being decoded."""

    group: Group
    sample: Sample
    sequence: int
    next_token: int
    guess: Sequence[int] = ()
    """The tokens that are fed after `next_token` in this pass, to be verified."""

    @property
    def held(self) -> int:
        """Tokens in its sequence between two steps."""
        return len(self.group.tokens) - 1 + len(self.sample.completion.draws)


@dataclass(eq=False)
class Kept:
    """A sequence that is not decoded, and its tokens."""

    sequence: int
    tokens: "Tokens[int]"
    session: Hashable | None = None


class Sequences:
    """The sequences of an engine: opens, copies and keeps them."""

    def __init__(
        self,
        backend: Backend,
        parallel: int,
        roomy: bool,
        reading: Sequence[Group],
        streams: Sequence[Stream],
    ) -> None:
        """Sets up an empty store of sequences.

        `roomy`: there are more than `parallel` samples and the root need. `reading` and `streams` are the
        scheduler's own lists, which change.
        """
        self.root: Kept | None = None
        """The common beginning of consecutive prompts, in a run."""
        self._backend, self._roomy = backend, roomy
        self._reading, self._streams = reading, streams
        self._numbers_matter = parallel > 1
        self._kept: list[Kept] = []  # the least recently used first
        self._freed: list[int] = []  # numbers that streams have left since the ranks were closed
        self._gathered: set[int] = set()  # the streams' numbers after the last attempt

    def attach(self, group: Group) -> None:
        """Gives a job its sequence: a kept one, a copy as far as it agrees, or an empty one."""
        most = len(group.tokens) - 1
        shared, source = self.longest(group)
        own, kept = self.of_session(group)
        if kept is None or own + WORTH_SHARING <= shared:
            own, kept = shared, self.at(source)
            if kept is not None and common(kept.tokens, group.tokens) < len(kept.tokens):
                kept = None  # its other tokens may be continued, too
        in_root = self.in_root(group.tokens, most)
        in_root = in_root if in_root >= WORTH_SHARING else 0
        if kept is not None and own >= in_root:
            group.sequence = self.take(kept)
        elif shared >= in_root + WORTH_SHARING:
            own, group.sequence = shared, self.copy(source)
        elif in_root and self.root is not None:
            own, group.sequence = in_root, self.copy(self.root.sequence)
        else:
            own, group.sequence = 0, self.open()
        group.read = group.timings.cached_tokens = self._backend.trim(group.sequence, own)

    # -------------------------------------------------------------------------------- kept sequences

    def keep(self, kept: Kept) -> None:
        """Keeps a sequence, with the tokens that the engine really holds; releases an empty one."""
        del kept.tokens[self._backend.length(kept.sequence) :]
        if kept.tokens:
            self._kept.append(kept)
        else:
            self._backend.release(kept.sequence)

    @property
    def kept(self) -> int:
        """Number of kept sequences."""
        return len(self._kept)

    def at(self, sequence: int | None) -> Kept | None:
        """Returns the kept sequence of this number, or None."""
        return next((kept for kept in self._kept if kept.sequence == sequence), None)

    def longest(self, group: Group) -> tuple[int, int | None]:
        """Returns the longest beginning of a prompt in any sequence except the root, and that sequence."""
        length, kept = _longest(self._kept[::-1], group)  # of equal ones, the one used last
        best = length, None if kept is None else kept.sequence
        return max(best, self.longest_running(group), key=lambda pair: pair[0])

    def longest_running(self, group: Group) -> tuple[int, int | None]:
        """Returns the same among the sequences that are being read and decoded."""
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
        """Returns the same among the kept sequences of the job's session; of equal ones, the first."""
        return _longest(self._of(group.job.session), group)

    def _of(self, session: Hashable | None) -> list[Kept]:
        return [kept for kept in self._kept if session is not None and kept.session == session]

    def take(self, kept: Kept) -> int:
        """Returns a kept sequence, which is then no longer kept; others of its session are dropped."""
        self._kept.remove(kept)
        for other in self._of(kept.session):
            self._drop(other)
        return kept.sequence

    def make_room(self) -> bool:
        """Drops the least recently used sequence, and the root last; returns False if there is none."""
        if self._drop_oldest():
            return True
        if self.root is None:
            return False
        self.give_up_root()
        return True

    def in_root(self, prompt: "Tokens[int]", most: int) -> int:
        """Returns how many tokens of the prompt the root holds."""
        return 0 if self.root is None else common(self.root.tokens, prompt, most)

    def start_root(self, tokens: "Tokens[int]", donor: int | None) -> Kept:
        """Returns the root with these tokens only, or with a beginning of them.

        `donor` is a sequence that begins with them. Without a donor the root keeps those of the tokens that
        it has already.
        """
        if self.root is None or donor is not None:
            self.give_up_root()
            self.root = Kept(self.open() if donor is None else self.copy(donor), tokens)
        length = min(len(tokens), self._backend.length(self.root.sequence))
        self.root.tokens = tokens[: self._backend.trim(self.root.sequence, length)]
        return self.root

    def give_up_root(self) -> None:
        """Releases the root's sequence."""
        if self.root is not None:
            self._backend.release(self.root.sequence)
            self.root = None

    def clear(self) -> None:
        """Drops all kept sequences."""
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
        """Returns a new sequence. Raises BackendError if all are in use."""
        return self._number(self._backend.open, None)

    def copy(self, source: int | None) -> int:
        """Returns a copy of a sequence; the sequence itself, if it is kept and there is no room for another.

        Raises BackendError if all are in use.
        """
        assert source is not None
        kept = self.at(source)
        if kept is not None:  # makes it the most recently used
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
        """Drops a kept sequence that would leave a gap when a new sequence gets the smallest free number.

        In a run, decoded sequences have the smallest numbers; otherwise it is enough that no kept one is
        between them. If there is room to keep it elsewhere, `close_ranks` moves it.
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
        """Records that a stream has left this number."""
        if self._numbers_matter:
            self._freed.append(sequence)

    def _numbers(self) -> list[int]:
        """Returns the numbers of the sequences that are fed."""
        reading = [group.sequence for group in self._reading if group.sequence is not None]
        return [stream.sequence for stream in self._streams] + reading

    def close_ranks(self) -> None:
        """Moves streams so that the numbers of all follow in order.

        Engines would otherwise compute them in several passes: the last samples of a run one by one, and a
        server's clients wherever earlier conversations are kept between them. While prompts are read, only a
        run's numbers are closed; such a pass has several parts anyway.
        """
        if self.root is not None:
            self._close_gaps(self.root.sequence)
        elif not self._reading:
            self._gather()

    def _close_gaps(self, root: int) -> None:
        """Moves the last streams into the numbers that others have left, in a run."""
        if not self._freed:
            return
        gaps, self._freed = self._freed, []
        held = {*self._numbers(), root}
        for gap in gaps:
            last = max(self._streams, key=lambda stream: stream.sequence, default=None)
            if gap in held or last is None or last.sequence < gap:
                continue
            kept = self.at(gap)
            if kept is not None:
                self._move_away(kept)
            try:
                copy = self._backend.fork(last.sequence)
            except BackendError:  # other adapters' sequences have all the numbers
                return
            if copy < last.sequence:
                last.sequence, copy = copy, last.sequence
            self._backend.release(copy)

    def _gather(self) -> None:
        """Moves streams next to each other, with as few copies as possible; kept sequences make way."""
        self._freed.clear()
        fed = {stream.sequence for stream in self._streams}
        if not self._numbers_matter or fed == self._gathered or _follow_in_order(fed):
            return
        spare = self._spare()
        costs = {**{kept.sequence: 2 for kept in self._kept}, **dict.fromkeys(fed, 0)}  # copies
        if spare is not None:
            costs[spare] = 1
        starts = range(self._backend.max_sequences - len(fed) + 1)
        rows = [range(start, start + len(fed)) for start in starts]
        rows = [row for row in rows if all(number in costs for number in row)]
        if rows:
            row = min(rows, key=lambda row: sum(costs[number] for number in row))
            gaps = sorted((number for number in row if number not in fed), key=costs.__getitem__)
            strays = [stream for stream in self._streams if stream.sequence not in row]
            for stream, gap in zip(strays, gaps, strict=True):
                kept = self.at(gap)
                if kept is not None:
                    self._move_away(kept)
                self._move(stream, gap)
        self._gathered = {stream.sequence for stream in self._streams}

    def _spare(self) -> int | None:
        """Returns a free number. If all are taken, a kept sequence goes; None if there is none, either."""
        try:
            spare = self.open()
        except BackendError:
            return None
        self._backend.release(spare)
        return spare

    def _move(self, stream: Stream, number: int) -> None:
        """Moves a stream to a free number. The engine gives the smallest one, so smaller ones are held."""
        smaller = []
        while (opened := self._backend.open()) != number:
            smaller.append(opened)
        self._backend.release(number)
        copy = self._backend.fork(stream.sequence)
        for sequence in (stream.sequence, *smaller):
            self._backend.release(sequence)
        stream.sequence = copy

    def _move_away(self, kept: Kept) -> None:
        """Frees the number of a kept sequence, which gets another one if there is room."""
        if self._roomy:
            with suppress(BackendError):  # all numbers are taken
                copy = self._backend.fork(kept.sequence)
                self._backend.release(kept.sequence)
                kept.sequence = copy
                return
        self._drop(kept)


def _follow_in_order(numbers: set[int]) -> bool:
    return not numbers or max(numbers) - min(numbers) < len(numbers)


def _longest(some: Sequence[Kept], group: Group) -> tuple[int, Kept | None]:
    found: tuple[int, Kept | None] = (0, None)
    for kept in some:
        length = common(kept.tokens, group.tokens, len(group.tokens) - 1)
        if found[1] is None or length > found[0]:
            found = length, kept
    return found
