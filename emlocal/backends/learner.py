"""The contract of training: gradients of micro-batches, optimizer steps, state saved and restored."""

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
    """A prompt and an answer to train on."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids, at least one."""

    @property
    def answer(self) -> Sequence[int]:
        """Token ids, at least one: every token that was drawn, including the end token."""


@dataclass(frozen=True)
class Descent:
    """How a gradient is followed; see TrainingSettings."""

    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


class Processes:
    """The processes of a training run: this one alone, or those that `accelerate launch` started.

    Each has a device and the whole model. They answer and train on different rollouts, and send each other
    the results. Each computes everything else (rewards, guards, updates) for itself, from the same numbers,
    so the processes need no further agreement.
    """

    rank = 0
    """The number of this process. The first (0) writes files and prints."""
    count = 1
    device = "auto"
    """The default device of this process."""

    def gather(self, own: T) -> list[T]:
        """Returns each process's value, in their order; all processes get the same list."""
        return [own]

    def add_up(self, gradient: Any) -> None:
        """Replaces a gradient, one array of the engine's, in place by its sum over the processes."""


class OutOfMemoryError(Exception):
    """Raised when a micro-batch does not fit. Drop the gradient so far and start again with smaller ones."""


class Learner(ABC):
    """A loaded model with a LoRA adapter that is being trained. Not for use from two threads at once."""

    parameters: int
    """Number of trained parameters."""
    processes: Processes
    """The processes that compute parts of the same gradient."""

    @abstractmethod
    def forget(self) -> None:
        """Drops the gradient."""

    @abstractmethod
    def update(self, learning_rate: float) -> float:
        """Takes an optimizer step with the sum of all processes' gradients, and drops the gradient.

        Returns the gradient's norm before clipping. If it is not finite, nothing was changed.
        """

    @abstractmethod
    def adapter(self) -> Adapter:
        """Returns a copy of the adapter."""

    @abstractmethod
    def put(self, adapter: Adapter) -> None:
        """Takes these weights; the optimizer stays as it is."""

    @abstractmethod
    def peak_memory(self) -> int:
        """Returns the most bytes used at once so far, of the device, or of this process on a CPU."""

    @abstractmethod
    def state(self) -> State:
        """Returns a copy of everything that the next steps depend on: adapter and optimizer."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Continues from a state. Raises ValueError for one of another shape."""


@dataclass(frozen=True)
class EntropyObjective:
    """EM-FT's loss; see FineTuneSettings."""

    kl_beta: float = 0.0
    measures_kl: bool = False
    """Whether to compute the KL, which takes another forward pass.

    It must be true if the KL is in the loss.
    """
    temperature: float = 1.0


@dataclass(frozen=True)
class EntropyTerms:
    """Sums over the answers' tokens of a micro-batch, nats."""

    tokens: int
    loss: float
    """Weighted, as it was trained on."""
    entropy: float
    """Entropy at the loss's temperature."""
    kl: float
    """KL to the base model; 0 if it was not asked for."""


class EntropyLearner(Learner):
    """A learner of EM-FT, which follows the entropy at answers' tokens."""

    @abstractmethod
    def accumulate(self, batch: Sequence[Answer], weights: Sequence[float]) -> EntropyTerms:
        """Runs one micro-batch forward and backward, and adds its gradient to the sum so far.

        `weights`: each answer's weight, which its tokens have in the loss.

        Raises OutOfMemoryError.
        """


@dataclass(frozen=True)
class Scores:
    """Scores of each token of some answers, one answer after the other, all [M] float32, nats."""

    log_probs: Floats
    """log π(y_t | y_<t) of the token that was drawn."""
    entropies: Floats
    """H(p_t), full vocabulary."""
    self_certainties: Floats
    """KL(U ‖ p_t)."""


@dataclass(frozen=True)
class TokenLosses:
    """The numbers that decide each token's loss, all [M] float32, one answer after the other."""

    advantages: Floats
    weights: Floats
    """Weight of each token's loss in the step's loss."""
    old: Floats | None = None
    """Log-probabilities when drawn, from `score`."""
    reference: Floats | None = None
    """Log-probabilities of the base model, from `score`."""
    pull: Floats | None = None
    """KL-Cov's coefficients."""

    def of(self, tokens: NDArray[np.intp]) -> "TokenLosses":
        """Returns the numbers of some tokens."""
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
    """Number of tokens held at the clip."""


class PolicyLearner(Learner):
    """A learner that follows the policy gradient of answers that were drawn from the model (EM-RL)."""

    @abstractmethod
    def score(self, batch: Sequence[Answer], *, base: bool = False) -> Scores:
        """Scores answers in a forward pass; with `base`, without the adapter.

        Raises OutOfMemoryError.
        """

    @abstractmethod
    def divergences(self, group: Sequence[Answer]) -> Floats:
        """Returns how much a prompt's answers disagree at each position, [longest answer].

        See `emlocal.em.relatives.position_divergence`. Raises OutOfMemoryError.
        """

    @abstractmethod
    def accumulate(self, batch: Sequence[Answer], losses: TokenLosses) -> PolicyTerms:
        """Runs one micro-batch forward and backward, and adds its gradient to the sum so far.

        Raises OutOfMemoryError, and ValueError if an array that the loss needs is missing.
        """


def padded(batch: Sequence[Answer]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Returns token ids, int64 [B, L], and whether each position predicts a token of the answer, bool [B, L].

    Position t predicts token t + 1. So an answer's first token is predicted at the prompt's last position,
    and its last token (the end token, if there is one) is not fed at all. Padding is on the right.
    """
    longest = max(len(each.prompt) + len(each.answer) - 1 for each in batch)
    tokens = np.zeros((len(batch), longest), dtype=np.int64)
    predicts = np.zeros((len(batch), longest), dtype=np.bool_)
    for i, each in enumerate(batch):
        fed = (*each.prompt, *each.answer[:-1])
        tokens[i, : len(fed)] = fed
        predicts[i, len(each.prompt) - 1 : len(fed)] = True
    return tokens, predicts
