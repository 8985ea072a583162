"""EM-FT on torch."""

from collections.abc import Sequence

import torch
from torch import nn

from emlocal.backends.learner import Answer, Descent, EntropyLearner, EntropyObjective, EntropyTerms
from emlocal.backends.torch.learner import TorchLearner
from emlocal.backends.torch.objective import em_ft_loss
from emlocal.models.adapters.adapter import Adapter


class TorchEntropyLearner(TorchLearner, EntropyLearner):
    """Trains a LoRA adapter on the entropy of answers' tokens."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        descent: Descent,
        objective: EntropyObjective,
        *,
        checkpointing: bool = False,
    ) -> None:
        """See `TorchLearner`."""
        super().__init__(model, adapter, descent, checkpointing=checkpointing)
        self._objective = objective

    def accumulate(self, batch: Sequence[Answer], weights: Sequence[float]) -> EntropyTerms:
        with self._pass(batch) as (tokens, predicts):
            of_each = torch.tensor(weights, dtype=torch.float32)
            lengths = torch.tensor([len(each.answer) for each in batch])
            terms = em_ft_loss(
                self._states(tokens, predicts),
                self._head,
                of_each.repeat_interleave(lengths).to(self._device),
                base_hidden=self._base_states(tokens, predicts) if self._objective.measures_kl else None,
                beta=self._objective.kl_beta,
                temperature=self._objective.temperature,
            )
            torch.autograd.backward(terms.loss)
            sums = torch.stack([terms.loss.detach(), terms.entropy.sum(), terms.kl.sum()]).tolist()
        return EntropyTerms(int(lengths.sum()), *sums)
