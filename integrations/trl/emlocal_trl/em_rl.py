"""EM-RL on TRL: RLOO with rewards that come from the model itself.

    token      −Σ_t H(p_t)     paper eq. 4
    sequence   Σ_t log π(y_t)  paper eq. 3

TRL computes the answers' log-probabilities just before it asks for rewards. The entropies come from the same
pass, so the rewards cost no pass of their own. TRL's loss is on whole answers: emlocal's averaging `sum`.
Self-certainty needs the logits' mean beside their log-sum, which TRL's fused head does not give.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from trl import RLOOConfig, RLOOTrainer

from emlocal.training.rl_settings import RLSettings
from emlocal_trl.guards import Guard, note_repetition

Reward = Literal["token", "sequence"]


class OwnReward:
    """A reward function that hands on what the trainer has computed."""

    __name__ = "em"

    def __init__(self) -> None:
        self.values: list[float] = []

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        assert len(self.values) == len(completions)
        return self.values


class EMRLTrainer(RLOOTrainer):  # type: ignore[misc]
    """A trainer by EM-RL."""

    _name = "EM-RL"

    def __init__(
        self,
        model: Any,
        args: RLOOConfig,
        reward: Reward = "token",
        settings: RLSettings = RLSettings(),
        reward_funcs: list[Any] | None = None,
        **more: Any,
    ) -> None:
        """Sets up the trainer.

        Args:
            settings: emlocal's; of them, the scale of the reward (`normalize`) and the guards are used.
            reward_funcs: more rewards beside it; `args.reward_weights` weighs them.
            more: as for RLOOTrainer: train_dataset, peft_config, callbacks, …
        """
        self.reward, self.settings = reward, settings
        self._own = OwnReward()
        self._scoring = False
        self._scored: tuple[Tensor, Tensor] | None = None
        guard = Guard(settings)
        callbacks = [*(more.pop("callbacks", None) or ()), guard]
        super().__init__(model, [self._own, *(reward_funcs or ())], args, callbacks=callbacks, **more)

    def _generate(self, prompts: Any) -> Any:
        found = super()._generate(prompts)
        note_repetition(self, found[1])
        return found

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        self._scored, self._scoring = None, True
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._scoring = False

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if not self._scoring or self._scored is not None:  # the reference's pass comes second
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        found = super()._get_per_token_logps_and_entropies(*args, **{**kwargs, "compute_entropy": True})
        self._scored = found[0], found[1]
        return found

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Any:
        assert self._scored is not None
        log_probs, entropies = self._scored
        lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=log_probs.device)
        counts = torch.arange(log_probs.shape[1], device=log_probs.device) < lengths[:, None]
        each = -entropies if self.reward == "token" else log_probs
        rewards = torch.where(counts, each, 0.0).sum(-1)
        if self.settings.normalize == "mean":
            rewards = rewards / lengths
        self._own.values = rewards.tolist()
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
