"""How long an evaluation will take, from its first answers."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from emlocal.text import counted, long_run

ENOUGH = 20.0
"""Seconds of answering that a forecast is made from."""


class Forecast:
    """A `Progress` that passes everything on, and says once if the evaluation will take long.

    A method's answers cost as much as their samples do together; what they read is left out.
    """

    def __init__(
        self,
        methods: Sequence[tuple[str, int, int]],
        progress: Callable[[str, int, int], None],
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        at_once: int = 0,
    ) -> None:
        """Takes what is to be done.

        `methods`: name, answers that are missing, and samples of an answer, in their order. `at_once`:
        samples that are drawn side by side; at any time half of their tokens are drawn.
        """
        self._begun = at_once / 2
        self._left = {name: answers for name, answers, _ in methods}
        self._samples = {name: samples for name, _, samples in methods}
        self._progress, self._note, self._clock = progress, note, clock
        self._began: float | None = None
        self._drawn = 0
        self._last: dict[str, int] = {}
        self._done = False

    def __call__(self, what: str, done: int, total: int) -> None:
        self._progress(what, done, total)
        if self._done or what not in self._left:
            return
        new = done - self._last.get(what, done)
        self._last[what] = done
        self._left[what] -= new
        self._drawn += new * self._samples[what]
        if self._began is None:
            self._began = self._clock()
        seconds = self._clock() - self._began
        if self._drawn and seconds >= ENOUGH:
            self._done = True
            for line in self._lines(seconds):
                self._note(line)

    def _lines(self, seconds: float) -> list[str]:
        left = sum(answers * self._samples[name] for name, answers in self._left.items())
        answers = counted(sum(self._left.values()), "answer")
        why = f"{answers} by {counted(len(self._left), 'method')} are left"
        begun = min(self._begun, left / 2)
        seconds *= (left - begun) / (self._drawn + begun)
        return long_run(seconds, why, "--limit, --max-tokens, or name fewer --methods")


def rows_in(path: Path) -> int:
    """Returns the number of lines in a file of answers; 0 if there is no file."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)
