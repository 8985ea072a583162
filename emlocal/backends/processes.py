"""The processes of a training run: this one alone, or those that `accelerate launch` started.

Each has a device and the whole model. They answer and train on different rollouts, and tell each other what
came of it; everything else (rewards, guards, updates) each computes for itself, from the same numbers. So
they need not agree on anything but that.
"""

from typing import Any, TypeVar

T = TypeVar("T")


class Processes:
    """One process."""

    rank = 0
    """Which one this is. The first writes files and speaks."""
    count = 1
    device = "auto"
    """What it is to compute on, where nobody says."""

    def gather(self, own: T) -> list[T]:
        """What each process has, in their order; all get the same."""
        return [own]

    def add_up(self, gradient: Any) -> None:
        """Bring a gradient, one array of the engine's, in place to the sum over the processes."""
