"""EM-FT: follow the gradient of the entropy of the answers' tokens (paper eq. 2)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emlocal.backends.learner import Descent, EntropyLearner, EntropyObjective
from emlocal.errors import UsageError
from emlocal.formatting import counted, plain
from emlocal.models.adapters.adapter import Adapter
from emlocal.training.batching import MicroBatches, token_weights
from emlocal.training.engines import Objective
from emlocal.training.loop import Gradient
from emlocal.training.prompts import Prompt
from emlocal.training.rollouts import Rollout
from emlocal.training.settings import FineTuneSettings

if TYPE_CHECKING:
    from emlocal.backends.engine import Opened


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


def em_ft(settings: FineTuneSettings, recipe: str = "default") -> Objective[EntropyLearner]:
    """What `emlocal finetune` trains; `recipe`: the name of what the settings began with."""

    def check(prompts: Sequence[Prompt]) -> None:
        if recipe == "one-shot" and len(prompts) > 1:
            raise UsageError(
                f"--recipe one-shot trains on one prompt; there are {len(prompts):,}", "choose one: --limit 1"
            )

    def learner(opened: "Opened", adapter: Adapter, descent: Descent, checkpointing: bool) -> EntropyLearner:
        objective = EntropyObjective(settings.kl_beta, settings.measures_kl, settings.temperature)
        return opened.entropy_learner(adapter, descent, objective, checkpointing=checkpointing)

    def told(prompts: int) -> Sequence[str]:
        s = settings
        return (
            f"recipe {recipe}: {counted(s.steps, 'step')} of {counted(s.prompts_per_step, 'answer')}"
            f" to {counted(prompts, 'prompt')},",
            f"learning rate {plain(s.learning_rate)}, β {plain(s.kl_beta)}, rank {s.rank}, seed {s.seed}",
        )

    return Objective(
        "finetune", settings, check, learner, lambda made, _: FineTune(settings, made), told, "em-ft"
    )
