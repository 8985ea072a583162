"""When a run has to stop by itself: it may collapse, and no labels are there to show it.

A model that only minimizes its entropy ends in answers that are certain and worthless: loops, one-word
answers, text without end. These show in the answers themselves, against those of the model as it was before
the first update: a collapse can be over within one or two of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from emlocal.training.rollouts import RolloutStats
from emlocal.training.settings import TrainingSettings

WINDOW = 3
"""Steps whose mean decides whether to stop: a single step's few answers vary."""


@dataclass
class Guards:
    """Looks at each step's answers; `history` is all that it remembers."""

    settings: TrainingSettings
    history: list[dict[str, float]] = field(default_factory=list)

    def look(self, stats: RolloutStats) -> str | None:
        """Why the run has to stop, in words, by a step's answers; None while it is well."""
        self.history.append(
            {"entropy": stats.entropy, "repetition": stats.repetition, "length": stats.length}
        )
        return self._beyond(_mean(self.history[-WINDOW:]))

    def look_at_kl(self, kl: float) -> str | None:
        """The same by the mean KL to the base of the answers looked at last, nats a token."""
        self.history[-1]["kl"] = kl
        return self._beyond(_mean(self.history[-WINDOW:]))

    @property
    def sound(self) -> bool:
        """Whether the answers looked at last are within the limits by themselves.

        The mean of a window lags behind a collapse: the adapter to keep is one from before it.
        """
        return self._beyond(self.history[-1]) is None

    def _beyond(self, now: Mapping[str, float]) -> str | None:
        """Which limit is passed, in words."""
        first, limits = self.history[0], self.settings
        if now["entropy"] < limits.entropy_floor:
            return (
                f"the answers' entropy is {now['entropy']:.3f} nats a token,"
                f" below --entropy-floor {limits.entropy_floor:g}"
            )
        if now["repetition"] > first["repetition"] + limits.max_repetition:
            return (
                f"{now['repetition']:.0%} of the answers' text is repeated,"
                f" {first['repetition']:.0%} at first (--max-repetition {limits.max_repetition:g})"
            )
        change = now["length"] / first["length"]
        if not 1 / limits.max_length_change <= change <= limits.max_length_change:
            return (
                f"the answers have {now['length']:.0f} tokens, {first['length']:.0f} at first"
                f" (--max-length-change {limits.max_length_change:g})"
            )
        if 0 < limits.max_kl < now.get("kl", 0.0):
            return f"the KL to the base is {now['kl']:.2f} nats a token, above --max-kl {limits.max_kl:g}"
        return None


def _mean(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the numbers that every step has: the last one's KL may not be known yet."""
    names = set.intersection(*(set(step) for step in steps))
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}
