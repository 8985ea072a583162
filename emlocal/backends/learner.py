"""What an engine must do to train: gradients of micro-batches, optimizer steps, its state out and in."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from emlocal.models.adapters.adapter import Adapter

T = TypeVar("T")
State = Mapping[str, NDArray[np.generic]]
Floats = NDArray[np.float32]


class Answer(Protocol):
    """What is trained on."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids, at least one."""

    @property
    def answer(self) -> Sequence[int]:
        """Token ids, at least one: every token that was drawn, the end token too."""


@dataclass(frozen=True)
class Descent:
    """How a gradient is followed; see TrainingSettings."""

    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class Processes:
    """The processes of a training run: this one alone, or those that `accelerate launch` started.

    Each has a device and the whole model. They answer and train on different rollouts, and tell each other
    the results; everything else (rewards, guards, updates) each computes for itself, from the same numbers.
    So they need not agree on anything but that.
    """

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


class OutOfMemoryError(Exception):
    """A micro-batch did not fit; the gradient so far is to be dropped and made anew in smaller ones."""


class Learner(ABC):
    """A loaded model with a LoRA adapter that is being trained. Not for use from two threads at once."""

    parameters: int
    """Numbers that are trained."""
    processes: Processes
    """Who else makes parts of the same gradient."""

    @abstractmethod
    def forget(self) -> None:
        """Drop the gradient."""

    @abstractmethod
    def update(self, learning_rate: float) -> float:
        """An optimizer step with the sum of all processes' gradients, which is dropped.

        Returns its length before clipping; where that is not finite, nothing was changed.
        """

    @abstractmethod
    def adapter(self) -> Adapter:
        """A copy of the adapter."""

    @abstractmethod
    def put(self, adapter: Adapter) -> None:
        """Take these weights; the optimizer is left as it is."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Bytes: the most that was taken at once so far, of the device, or of this process on a CPU."""

    @abstractmethod
    def state(self) -> State:
        """A copy of all that the next steps depend on: adapter and optimizer."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Go on from a state. Raises ValueError for one of another shape."""


@dataclass(frozen=True)
class EntropyObjective:
    """EM-FT's loss; see FineTuneSettings."""

    kl_beta: float = 0.0
    measures_kl: bool = False
    """Compute the KL: another forward pass. Where it is in the loss, it must be."""
    temperature: float = 1.0


@dataclass(frozen=True)
class EntropyTerms:
    """Sums over the answers' tokens of a micro-batch, nats."""

    tokens: int
    loss: float
    """Weighted, as it was trained on."""
    entropy: float
    """At the loss's temperature."""
    kl: float
    """To the base model; 0 where it was not asked for."""


class EntropyLearner(Learner):
    """Follows the entropy of the distributions that answers' tokens were drawn from (EM-FT)."""

    @abstractmethod
    def accumulate(self, batch: Sequence[Answer], weights: Sequence[float]) -> EntropyTerms:
        """Forward and backward of one micro-batch; its gradient is added to what there is.

        `weights`: of each answer's tokens in the loss.

        Raises OutOfMemoryError.
        """


@dataclass(frozen=True)
class Scores:
    """Of each token of some answers, one answer after the other, all [M] float32, nats."""

    log_probs: Floats
    """log π(y_t | y_<t) of the token that was drawn."""
    entropies: Floats
    """H(p_t), full vocabulary."""
    self_certainties: Floats
    """KL(U ‖ p_t)."""


@dataclass(frozen=True)
class TokenLosses:
    """What decides the loss of each token of some answers, all [M] float32, one answer after the other."""

    advantages: Floats
    weights: Floats
    """Of each token's loss in the step's."""
    old: Floats | None = None
    """Log-probabilities when drawn, by `score`."""
    reference: Floats | None = None
    """Log-probabilities of the base model, by `score`."""
    pull: Floats | None = None
    """KL-Cov's coefficients."""

    def of(self, tokens: NDArray[np.intp]) -> "TokenLosses":
        """Those of some tokens."""
        taken = {name: values[tokens] for name, values in vars(self).items() if values is not None}
        return TokenLosses(**taken)


@dataclass(frozen=True)
class PolicyTerms:
    """Sums over the answers' tokens of a micro-batch, nats."""

    tokens: int
    loss: float
    """Weighted, as it was trained on."""
    entropy: float
    kl: float
    """k3 to the base model; 0 without a reference."""
    clipped: int
    """Tokens held at the clip."""


class PolicyLearner(Learner):
    """Follows the policy gradient of answers that were drawn from the model (EM-RL)."""

    @abstractmethod
    def score(self, batch: Sequence[Answer], *, base: bool = False) -> Scores:
        """A forward pass over answers, by the model as it is or, with `base`, without the adapter.

        Raises OutOfMemoryError.
        """

    @abstractmethod
    def divergences(self, group: Sequence[Answer]) -> Floats:
        """How much a prompt's answers disagree at each position, [longest answer], see
        `emlocal.em.relatives.position_divergence`.

        Raises OutOfMemoryError.
        """

    @abstractmethod
    def accumulate(self, batch: Sequence[Answer], losses: TokenLosses) -> PolicyTerms:
        """Forward and backward of one micro-batch; its gradient is added to what there is.

        Raises OutOfMemoryError, and ValueError where something is missing that the loss needs.
        """


def padded(batch: Sequence[Answer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids int64 [B, L], and bool [B, L]: whether that position predicts a token of the answer.

    Position t predicts token t + 1. So an answer's first token is predicted at the prompt's last, and its
    last token (the end token, where there is one) is not fed at all. Padding is on the right.
    """
    longest = max(len(each.prompt) + len(each.answer) - 1 for each in batch)
    tokens = np.zeros((len(batch), longest), dtype=np.int64)
    predicts = np.zeros((len(batch), longest), dtype=np.bool_)
    for i, each in enumerate(batch):
        fed = (*each.prompt, *each.answer[:-1])
        tokens[i, : len(fed)] = fed
        predicts[i, len(each.prompt) - 1 : len(fed)] = True
    return tokens, predicts
