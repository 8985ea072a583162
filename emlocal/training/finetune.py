"""EM-FT: follow the gradient of the entropy of the answers' tokens (paper eq. 2)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from emlocal.backends.learner import EntropyLearner
from emlocal.training.batching import MicroBatches, token_weights
from emlocal.training.loop import Gradient
from emlocal.training.rollouts import Rollout
from emlocal.training.settings import FineTuneSettings


@dataclass(frozen=True)
class FineTune:
    """One answer to each prompt, one update a step. A `loop.Method`."""

    settings: FineTuneSettings
    learner: EntropyLearner
    samples: int = 1

    def identity(self) -> dict[str, Any]:
        """Nothing beside the prompts."""
        return {}

    def gradients(
        self, step: int, chosen: Sequence[int], rollouts: Sequence[Rollout], batches: MicroBatches
    ) -> Iterator[Gradient]:
        """See `loop.Method`."""
        weights = token_weights(rollouts, self.settings.normalize)
        parts = batches.run(
            step,
            rollouts,
            lambda part: self.learner.accumulate([rollouts[i] for i in part], [weights[i] for i in part]),
        )
        tokens = sum(terms.tokens for _, terms in parts)
        kl = sum(terms.kl for _, terms in parts) / tokens
        yield Gradient(
            kl if self.settings.measures_kl else None,
            {
                "loss": sum(terms.loss for _, terms in parts),
                "loss_entropy": sum(terms.entropy for _, terms in parts) / tokens,
            },
        )
