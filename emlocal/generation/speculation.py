"""Guessed tokens: several tokens of a sample from one pass, and the text that it has without them.

Each draw has an address: its uniform number depends on seed, request, sample and the number of the token. So
a guess is right if, and only if, the row before it draws that very token, with its EM step, penalties and
mask. The text is therefore the one without guesses, whatever is guessed. Only the engine's sums can differ
in the last bits, because their order depends on the number of rows in a pass (docs/speculation.md).

A `Guesser` proposes how an answer continues. A `Pace` decides how much of that is worth its rows.
"""

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.generation.runner import Job
    from emlocal.generation.sequences import Stream
    from emlocal.settings.options import SpeculateName

MOST = 15
"""The most tokens that are guessed for a sample in one pass."""
LOOKUP_MOST = 7
"""The most without a `Pace`: eight rows still share the reading of the weights on most machines."""
_LONGEST_MATCH = 8  # tokens compared of two places in a text
_PLACES = 8  # places that are compared: those seen last


class Guess(NamedTuple):
    """A proposal how an answer continues."""

    tokens: Sequence[int] = ()
    strength: int = 0
    """A number of the guesser's; guesses of one strength are right about equally often."""


class Guesser(Protocol):
    """Guesses the continuations of one job's samples."""

    def read(self, sample: int, answer: Sequence[int]) -> None:
        """Takes in a sample's answer so far; it begins with what was read before."""

    def guess(self, sample: int, most: int) -> Guess:
        """Proposes at most `most` next tokens of a sample."""


class Lookup:
    """Prompt lookup: what followed the last tokens where they stood before.

    It looks in the prompt, in the answer so far, and in the other samples of the job. The longest match of at
    least two tokens counts, of equally long ones that seen last.
    """

    def __init__(self, job: "Job") -> None:
        self._tail = list(job.prompt[-_LONGEST_MATCH:])
        self._texts: dict[int, list[int]] = {-1: list(job.prompt)}  # -1: the prompt
        self._places: dict[tuple[int, int], list[tuple[int, int]]] = {}  # where each pair ends
        self._note(-1, 0)

    def _note(self, name: int, start: int) -> None:
        """Notes the pairs of a text that end at `start` or later."""
        text = self._texts[name]
        for end in range(max(start, 1), len(text)):
            self._places.setdefault((text[end - 1], text[end]), []).append((name, end + 1))

    def read(self, sample: int, answer: Sequence[int]) -> None:
        text = self._texts.setdefault(sample, [*self._tail])
        start = len(text)
        text += answer[start - len(self._tail) :]
        self._note(sample, start)

    def guess(self, sample: int, most: int) -> Guess:
        own = self._texts.get(sample, self._tail)
        if len(own) < 2 or most < 1:
            return Guess()
        best, at = 1, (0, 0)
        for name, end in reversed(self._places.get((own[-2], own[-1]), ())[-_PLACES - 1 :]):
            text = self._texts[name]
            if end == len(text):
                continue  # nothing follows; one of them is the end of the answer itself
            length = 2
            limit = min(end, len(own), _LONGEST_MATCH)
            while length < limit and text[end - 1 - length] == own[-1 - length]:
                length += 1
            if length > best:
                best, at = length, (name, end)
        if best < 2:
            return Guess()
        name, end = at
        found = self._texts[name][end : end + most]
        if name == sample:  # a text that repeats itself goes on with what is guessed here
            while len(found) < most:
                found.append(found[len(found) - (len(own) - end)])
        return Guess(found, best)


class Pace:
    """Decides how many guessed tokens are worth their rows, from this machine's passes so far.

    Known are the seconds of passes by their number of rows, and how often guesses were right. Guesses that
    are not fed count, too: the token drawn next tells whether they would have been right. An account compares
    each pass with one without guesses. Beyond a loss of `ALLOWED` of all time, nothing is guessed.
    """

    ALLOWED = 0.01
    _WINDOW = 9  # passes of one size that are remembered; their median counts
    _KNOWN = 3  # passes without guesses before the first one with
    _MORE = 0.25  # what a row more costs, of a pass, as long as no such pass was measured
    _PRIOR = (1.0, 3.0)  # guesses right and tested, of a strength that was not seen yet
    _MEMORY = 64.0  # tests of a strength that count; older ones fade

    def __init__(self) -> None:
        self._passes: dict[int, deque[float]] = {}
        self._right: dict[int, list[float]] = {}
        self._gain = self._spent = 0.0

    def chance(self, strength: int) -> float:
        """Returns how often a guess of this strength is right, if those before it are."""
        right, tested = self._right.get(strength, self._PRIOR)
        return right / tested

    def seconds(self, rows: int) -> float:
        """Returns the expected seconds of a pass; at least one size must have been measured."""
        known = {size: statistics.median(times) for size, times in self._passes.items()}
        if rows in known:
            return known[rows]
        below = max((size for size in known if size < rows), default=None)
        above = min((size for size in known if size > rows), default=None)
        if below is None:
            return known[above or 0]
        if above is None:
            least = min(known)
            more = self._MORE * known[least]
            if least < below:  # a larger pass may be cheaper than one that seemed cheap enough
                more = max(0.0, known[below] - known[least]) / (below - least)
            return known[below] + more * (rows - below)
        share = (rows - below) / (above - below)
        return known[below] + share * (known[above] - known[below])

    def lengths(self, guesses: Sequence[Guess]) -> list[int]:
        """Returns how many tokens of each guess to feed, one guess for each sample of the pass."""
        n = len(guesses)
        chosen = [0] * n
        plain = self._passes.get(n, ())
        if len(plain) < self._KNOWN or not any(guess.tokens for guess in guesses):
            return chosen
        if self._gain < -(self.seconds(n) + self.ALLOWED * self._spent):
            return chosen
        steps = sorted(
            (
                (self.chance(guess.strength) ** depth, i)
                for i, guess in enumerate(guesses)
                for depth in range(1, len(guess.tokens) + 1)
            ),
            reverse=True,
        )
        expected, best, most = float(n), n / self.seconds(n), 0
        for rows, (chance, _) in enumerate(steps, n + 1):
            expected += chance
            if expected / self.seconds(rows) > best:
                best, most = expected / self.seconds(rows), rows - n
        for _, i in steps[:most]:
            chosen[i] += 1
        return chosen

    def tested(self, strength: int, right: bool) -> None:
        """Takes in whether a guessed token was right."""
        counts = self._right.setdefault(strength, [*self._PRIOR])
        counts[0] += right
        counts[1] += 1
        if counts[1] > self._MEMORY:
            counts[:] = [count / 2 for count in counts]

    def passed(self, seconds: float, samples: int, rows: int, tokens: int) -> None:
        """Takes in a pass: its seconds, samples, rows and drawn tokens."""
        self._passes.setdefault(rows, deque(maxlen=self._WINDOW)).append(seconds)
        self._spent += seconds
        if rows > samples:
            plain = self.seconds(samples)
            self._gain = min(self._gain + tokens / samples * plain - seconds, 10 * plain)


class Speculation:
    """The guesses of a scheduler's passes."""

    def __init__(self, guesser: Callable[["Job"], Guesser] = Lookup, pace: Pace | None = None) -> None:
        """`guesser` is called for each job. `pace`: None to feed every guess, up to `LOOKUP_MOST` tokens."""
        self._guesser = guesser
        self._pace = pace
        self._most = LOOKUP_MOST if pace is None else MOST
        self._guesses: dict[Stream, tuple[Guess, int]] = {}  # and how many of its tokens are fed
        self.fed = 0
        """Guessed tokens that were fed."""
        self.right = 0
        """Those that were right."""

    def guess(self, streams: Sequence["Stream"], context: int) -> None:
        """Sets the guess of each sample for the next pass, within its budget and the engine's context."""
        guesses = [self._guess(stream, context) for stream in streams]
        if self._pace is None:
            lengths = [len(guess.tokens) for guess in guesses]
        else:
            lengths = self._pace.lengths(guesses)
        for stream, guess, length in zip(streams, guesses, lengths, strict=True):
            stream.guess = tuple(guess.tokens[:length])
        self._guesses = dict(zip(streams, zip(guesses, lengths, strict=True), strict=True))

    def give_up(self, streams: Sequence["Stream"]) -> None:
        """Takes the guesses back before they are fed."""
        for stream in streams:
            stream.guess = ()
        self._guesses = {}

    def _guess(self, stream: "Stream", context: int) -> Guess:
        group, sample = stream.group, stream.sample
        if group.guesser is None:
            group.guesser = self._guesser(group.job)
        for completion in (*group.completions, sample.completion):
            group.guesser.read(completion.sample, completion.tokens)
        left = sample.request.max_tokens - len(sample.completion.tokens)  # the last one needs no row after it
        most = min(self._most, left - 1, context - stream.held - 1)
        if sample.forced is not None or most < 1:
            return Guess()
        return group.guesser.guess(sample.completion.sample, most)

    def learn(self, drawn: Mapping["Stream", Sequence[int]], rows: int, seconds: float | None) -> None:
        """Takes in the tokens that a pass with `rows` rows drew for each sample.

        `seconds`: of the forward pass; None if it did something else as well.
        """
        for stream, tokens in drawn.items():
            guess, length = self._guesses.get(stream, (Guess(), 0))
            for i, (token, guessed) in enumerate(zip(tokens, guess.tokens, strict=False)):
                fed, right = i < length, token == guessed
                self.fed += fed
                self.right += fed and right
                if self._pace is not None:
                    self._pace.tested(guess.strength, right)
        self._guesses = {}
        if self._pace is not None and seconds is not None and drawn:
            self._pace.passed(seconds, len(drawn), rows, sum(map(len, drawn.values())))


def speculation_of(
    mode: "SpeculateName", backend: "Backend", warn: Callable[[str], None]
) -> Speculation | None:
    """Returns what `--speculate` asks for, if the engine can go back from a guess; otherwise warns."""
    if mode != "off" and not backend.rewinds:
        warn(f"{backend.info.name} on {backend.name} cannot go back from a guessed token; --speculate is off")
        return None
    return {"off": None, "auto": Speculation(pace=Pace()), "lookup": Speculation()}[mode]
