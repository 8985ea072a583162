"""Micro-batches: rollouts of similar length together, each batch within a budget of tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from emlocal.backends.learner import OutOfMemoryError, Processes
from emlocal.errors import CancelledError, EmlocalError
from emlocal.training.rollouts import Rollout
from emlocal.training.settings import Normalize

_Result = TypeVar("_Result")


@dataclass
class MicroBatches:
    """Computes with a step's rollouts in parts that fit into memory."""

    budget: int
    """Tokens of a part, padding included. Halved when one did not fit, for the rest of the run."""
    forget: Callable[[], None]
    """Drops what parts have added to the gradient."""
    cancelled: Callable[[], bool]
    progress: Callable[[int, int, int], None]
    """Takes the step, rollouts done, and how many there are."""
    warn: Callable[[str], None]
    processes: Processes = field(default_factory=Processes)

    def run(
        self, step: int, rollouts: Sequence[Rollout], work: Callable[[list[int]], _Result]
    ) -> list[tuple[list[int], _Result]]:
        """Each part's indices, and what `work` makes of them.

        Where a part does not fit, all is forgotten and made anew in smaller ones.

        Raises CancelledError, and EmlocalError where a single rollout does not fit.
        """
        lengths = [len(rollout) for rollout in rollouts]
        while True:
            try:
                return self.run_parts(step, micro_batches(lengths, self.budget), work)
            except OutOfMemoryError:
                self.forget()
                if self.budget < max(lengths):
                    raise EmlocalError(
                        f"an answer of {max(lengths):,} tokens does not fit into memory by itself",
                        "give a smaller --max-tokens, or --gradient-checkpointing",
                    ) from None
                self.budget //= 2
                self.warn(f"out of memory: going on with micro-batches of {self.budget:,} tokens")

    def run_parts(
        self, step: int, parts: Sequence[list[int]], work: Callable[[list[int]], _Result]
    ) -> list[tuple[list[int], _Result]]:
        """The same with given parts, which the processes share among them.

        Raises CancelledError, and OutOfMemoryError: in all processes, whichever of them it came to.
        """
        own, total, done = parts[self.processes.rank :: self.processes.count], sum(map(len, parts)), 0
        results: list[tuple[list[int], _Result]] = []
        failure: type[Exception] | None = None
        for part in own:
            if self.cancelled():
                failure = CancelledError
                break
            try:
                results.append((part, work(part)))
            except OutOfMemoryError:
                failure = OutOfMemoryError
                break
            done += len(part)
            self.progress(step, done * self.processes.count, total)
        everyone = self.processes.gather((results, failure))
        for _, found in everyone:
            if found is not None:
                raise found
        return [result for theirs, _ in everyone for result in theirs]


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches whose padded size, number × longest, is within `budget` tokens.

    A single one that is longer has a batch to itself. Each index occurs once; the longest come first, so
    that what does not fit into memory shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def token_weights(rollouts: Sequence[Rollout], normalize: Normalize) -> list[float]:
    """The weight of each rollout's tokens in the step's loss.

    token: 1 / all tokens, so that each counts alike, however they are cut into micro-batches. sequence:
    1 / rollouts, the paper's eq. 2: a sum over the tokens, a mean over the answers.
    """
    if normalize == "sequence":
        return [1 / len(rollouts)] * len(rollouts)
    return [1 / sum(len(r.answer) for r in rollouts)] * len(rollouts)
