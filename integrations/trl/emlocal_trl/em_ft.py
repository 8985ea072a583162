"""EM-FT on TRL: the model answers, and the loss is H(p) + β·KL(p ‖ p⁰) of its own distributions.

TRL's RLOO trainer draws the answers, with or without vLLM, and splits them into micro-batches. The loss is
emlocal's kernel on the hidden states, so no logits are kept, and gradient and KL are exact. Each token of a
step counts the same, whatever process and micro-batch it is in.

The base model is the model without its adapter, so EM-FT needs LoRA.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl import RLOOConfig, RLOOTrainer

from emlocal.backends.torch.policy import em_ft_loss
from emlocal.errors import UsageError
from emlocal.training.settings import FineTuneSettings
from emlocal_trl.guards import Guard, note_repetition


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    """Returns 0 for each answer: EM-FT has no reward."""
    return [0.0] * len(completions)


class EMFTTrainer(RLOOTrainer):  # type: ignore[misc]
    """A trainer of a LoRA adapter by EM-FT."""

    _name = "EM-FT"

    def __init__(
        self, model: Any, args: RLOOConfig, settings: FineTuneSettings = FineTuneSettings(), **more: Any
    ) -> None:
        """Sets up the trainer.

        Args:
            settings: emlocal's; of them, the loss and the guards are used. `args` says the rest.
            more: as for RLOOTrainer: train_dataset, peft_config, callbacks, …
        Raises:
            UsageError: arguments that EM-FT cannot have.
        """
        if settings.learn != "entropy":
            raise UsageError("--learn vote is not for --trainer trl", "use emlocal's own loop")
        if (
            args.steps_per_generation not in (None, args.gradient_accumulation_steps)
            or args.num_iterations != 1
        ):
            raise UsageError(
                "EM-FT takes one optimiser step on each set of answers",
                "leave steps_per_generation and num_iterations as they are",
            )
        self.settings = settings
        self._tokens = self._answers = 0
        self._scoring = False
        guard = Guard(settings)
        super().__init__(
            model, no_reward, args, callbacks=[*(more.pop("callbacks", None) or ()), guard], **more
        )
        add_em_head(self.accelerator.unwrap_model(self.model).get_base_model())

    def _generate(self, prompts: Any) -> Any:
        found = super()._generate(prompts)
        note_repetition(self, found[1])
        return found

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Draws answers. Their log-probabilities are of no use here and are left out."""
        self._scoring = True
        try:
            found = super()._generate_and_score_completions(inputs)
        finally:
            self._scoring = False
        mask = found["completion_mask"]
        counts = torch.tensor([int(mask.sum()), len(mask)], device=mask.device)
        self._tokens, self._answers = self.accelerator.reduce(counts, "sum").tolist()
        return found

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._scoring:
            return input_ids.new_zeros((len(input_ids), logits_to_keep), dtype=torch.float32), None, None
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        counts = torch.cat([torch.zeros_like(inputs["prompt_mask"]), inputs["completion_mask"]], dim=1)
        given = {"input_ids": tokens, "attention_mask": attention}
        base = None
        if self.settings.measures_kl:
            own = self.accelerator.unwrap_model(self.model)
            with torch.no_grad(), self.accelerator.autocast(), own.disable_adapter():
                base = self.model(**given, em_counts=counts)
        per = self._tokens if self.settings.normalize == "token" else self._answers
        with self.accelerator.autocast():
            loss, entropy, kl = model(
                **given,
                em_counts=counts,
                em_weight=1 / per,
                em_base=base,
                em_beta=self.settings.kl_beta,
                em_temperature=self.settings.temperature,
            )
        sums = torch.stack([entropy.sum(), kl.sum(), entropy.new_tensor(len(entropy))])
        entropies, kls, positions = self.accelerator.reduce(sums, "sum").tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["entropy"].append(entropies / positions)
        self._metrics[mode]["kl"].append(kls / positions)
        # the Trainer divides by the micro-batches, and the processes' gradients are averaged
        scale = self.accelerator.num_processes * self.current_gradient_accumulation_steps
        return loss * scale if self.model.training else loss


def add_em_head(model: Any) -> None:
    """Makes `model(…, em_counts=…)` return hidden states and, with `em_weight`, the loss, H and KL.

    It is done in `forward`, so that wrappers (data parallel, FSDP2) see it, as TRL's own fused head does.
    """
    before = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        em_counts: Tensor | None = None,
        em_weight: float | None = None,
        em_base: Tensor | None = None,
        em_beta: float = 0.0,
        em_temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if em_counts is None:
            return before(*args, **kwargs)
        states = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1]
        hidden = states[em_counts[:, 1:] > 0]
        if em_weight is None:
            return hidden
        weight = self.get_output_embeddings().weight
        head = (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach()
        if head.device.type == "cpu":
            hidden, head = hidden.float(), head.float()
            em_base = None if em_base is None else em_base.float()
        weights = torch.full((len(hidden),), em_weight, dtype=torch.float32, device=hidden.device)
        terms = em_ft_loss(
            hidden, head, weights, base_hidden=em_base, beta=em_beta, temperature=em_temperature
        )
        return tuple(terms)

    model.forward = types.MethodType(forward, model)
