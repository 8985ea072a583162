"""What an engine must do to train: gradients of micro-batches, optimizer steps, its state out and in."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from emlocal.models.adapters.adapter import Adapter

State = Mapping[str, NDArray[np.generic]]


class Answer(Protocol):
    """What is trained on."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids, at least one."""

    @property
    def answer(self) -> Sequence[int]:
        """Token ids, at least one: every token that was drawn, the end token too."""


@dataclass(frozen=True)
class Objective:
    """The loss, and how its gradient is followed; see FineTuneSettings."""

    kl_beta: float = 0.0
    measures_kl: bool = False
    """Compute the KL even where it is not in the loss: another forward pass."""
    temperature: float = 1.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Terms:
    """Sums over the answers' tokens of a micro-batch, nats."""

    tokens: int
    loss: float
    """Weighted, as it was trained on."""
    entropy: float
    """At the loss's temperature."""
    kl: float
    """To the base model; 0 where it was not asked for."""

    def __add__(self, other: "Terms") -> "Terms":
        return Terms(
            self.tokens + other.tokens,
            self.loss + other.loss,
            self.entropy + other.entropy,
            self.kl + other.kl,
        )


class OutOfMemoryError(Exception):
    """A micro-batch did not fit; the gradient so far is to be dropped and made anew in smaller ones."""


class Learner(ABC):
    """A loaded model with a LoRA adapter that is being trained. Not for use from two threads at once."""

    parameters: int
    """Numbers that are trained."""

    @abstractmethod
    def accumulate(self, batch: Sequence[Answer], weights: Sequence[float]) -> Terms:
        """Forward and backward of one micro-batch; its gradient is added to what there is.

        `weights`: of each answer's tokens in the loss.

        Raises OutOfMemoryError.
        """

    @abstractmethod
    def forget(self) -> None:
        """Drop the gradient."""

    @abstractmethod
    def update(self, learning_rate: float) -> float:
        """An optimizer step with the gradient, which is dropped. Returns its length before clipping; where
        that is not finite, nothing was changed."""

    @abstractmethod
    def adapter(self) -> Adapter:
        """A copy of the adapter."""

    @abstractmethod
    def put(self, adapter: Adapter) -> None:
        """Take these weights; the optimizer is left as it is."""

    @abstractmethod
    def state(self) -> State:
        """A copy of all that the next steps depend on: adapter and optimizer."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Go on from a state. Raises ValueError for one of another shape."""
