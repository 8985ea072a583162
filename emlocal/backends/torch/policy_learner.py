"""EM-RL on torch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from emlocal.backends.learner import Answer, Descent, Floats, PolicyLearner, PolicyTerms, Scores, TokenLosses
from emlocal.backends.torch.learner import TorchLearner
from emlocal.backends.torch.policy import policy_gradient_loss, position_divergences, token_scores
from emlocal.em.policy_gradient import PolicyObjective
from emlocal.models.adapters.adapter import Adapter


class TorchPolicyLearner(TorchLearner, PolicyLearner):
    """Trains a LoRA adapter by policy gradients of drawn answers.

    The reference is the same model with its adapter switched off: there is no second copy.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        descent: Descent,
        objective: PolicyObjective,
        *,
        temperature: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        """`temperature`: at which answers are drawn, and so that of the policy. See `TorchLearner`."""
        super().__init__(model, adapter, descent, checkpointing=checkpointing)
        self._objective = objective
        self._temperature = temperature

    def score(self, batch: Sequence[Answer], *, base: bool = False) -> Scores:
        with torch.no_grad(), self._pass(batch) as (tokens, predicts):
            states = self._base_states if base else self._states
            found = token_scores(
                states(tokens, predicts), self._head, self._drawn(batch), temperature=self._temperature
            )
            return Scores(*torch.stack(found).cpu().numpy())

    def divergences(self, group: Sequence[Answer]) -> Floats:
        with torch.no_grad(), self._pass(group) as (tokens, predicts):
            lengths = [len(each.answer) for each in group]
            states = torch.split(self._states(tokens, predicts), lengths)
            found = position_divergences(states, self._head, temperature=self._temperature)
            divergences: Floats = found.cpu().numpy()
            return divergences

    def accumulate(self, batch: Sequence[Answer], losses: TokenLosses) -> PolicyTerms:
        with self._pass(batch) as (tokens, predicts):
            terms = policy_gradient_loss(
                self._states(tokens, predicts),
                self._head,
                self._drawn(batch),
                self._tensor(losses.advantages),
                self._tensor(losses.weights),
                self._objective,
                old=self._optional(losses.old),
                reference=self._optional(losses.reference),
                pull=self._optional(losses.pull),
                temperature=self._temperature,
            )
            torch.autograd.backward(terms.loss)
            sums = [terms.loss.detach(), terms.scores.entropy.sum(), terms.kl.sum(), terms.clipped.sum()]
            loss, entropy, kl, clipped = torch.stack([each.float() for each in sums]).tolist()
        return PolicyTerms(len(losses.weights), loss, entropy, kl, int(clipped))

    def _drawn(self, batch: Sequence[Answer]) -> Tensor:
        """The answers' tokens, [M] int64."""
        return torch.tensor([token for each in batch for token in each.answer], device=self._device)

    def _tensor(self, array: Floats) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _optional(self, array: Floats | None) -> Tensor | None:
        return None if array is None else self._tensor(array)
