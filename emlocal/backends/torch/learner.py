"""Training on torch: LoRA layers on a frozen model, AdamW, and a learner each for EM-FT and EM-RL."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from emlocal.backends.learner import (
    Answer,
    Descent,
    EntropyLearner,
    EntropyObjective,
    EntropyTerms,
    Floats,
    Learner,
    OutOfMemoryError,
    PolicyLearner,
    PolicyTerms,
    Processes,
    Scores,
    State,
    TokenLosses,
    padded,
)
from emlocal.backends.torch.model import attach, base_weights, lora_layers, out_of_memory
from emlocal.backends.torch.policy import em_ft_loss, policy_gradient_loss, position_divergences, token_scores
from emlocal.em.losses import PolicyObjective
from emlocal.errors import ModelError
from emlocal.machine import peak_memory
from emlocal.models.adapters.adapter import Adapter

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Kingma & Ba 2015; Loshchilov & Hutter 2019


class TorchLearner(Learner):
    """A learner that trains a LoRA adapter on a transformers model.

    The model is frozen and keeps the adapter attached.
    """

    def __init__(
        self, model: nn.Module, adapter: Adapter, descent: Descent, *, checkpointing: bool = False
    ) -> None:
        """Attaches the adapter. `checkpointing`: compute activations twice instead of keeping them."""
        self.processes = Processes()
        self.model = model
        self._descent = descent
        model.requires_grad_(False)
        attach(model, adapter)
        self._base_model = adapter.base_model
        self._layers = lora_layers(model)
        self._body = model.get_submodule("model")
        self._head = _head(model, self._body)
        self._parameters = [p for layer in self._layers.values() for p in (layer.a, layer.b)]
        self.parameters = sum(p.numel() for p in self._parameters)
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=descent.weight_decay,
            foreach=True,
        )
        self._device = self._head.device
        model.eval()
        self._recomputed: list[nn.Module] = []
        if checkpointing:
            model.activation_checkpointing_enable()  # type: ignore[operator]
            self._recomputed = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]

    @contextmanager
    def _pass(self, batch: Sequence[Answer]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields token ids and places of a micro-batch (see `padded`), to compute with in the block.

        Raises OutOfMemoryError if the block runs out of memory.
        """
        try:
            with self._fast_products(), self._checkpointing():
                tokens, predicts = map(torch.from_numpy, padded(batch))
                yield tokens.to(self._device), predicts.to(self._device)
        except RuntimeError as error:
            if out_of_memory(error):
                raise OutOfMemoryError from error
            raise

    def _base_states(self, tokens: Tensor, predicts: Tensor) -> Tensor:
        """Returns the hidden states of the model without its adapter."""
        with torch.no_grad(), base_weights(self.model):
            return self._states(tokens, predicts)

    def _states(self, tokens: Tensor, predicts: Tensor) -> Tensor:
        """Returns the hidden states that predict answers' tokens, [M, H].

        Rows are padded on the right, where causal attention does not look, so they need no mask.
        """
        states: Tensor = self._body(input_ids=tokens, use_cache=False).last_hidden_state
        return states[predicts]

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Makes the layers compute their activations twice within this block.

        It is not on elsewhere, because the layers then keep no keys and values, which answering needs.
        `training` is set on these layers alone, so their children do not use dropout.
        """
        for layer in self._recomputed:
            layer.training = True
        try:
            yield
        finally:
            for layer in self._recomputed:
                layer.training = False

    @contextmanager
    def _fast_products(self) -> Iterator[None]:
        """Lets the head's float32 products use bfloat16 numbers, for a bfloat16 model on a CPU.

        Their sums, and so the logits, stay float32.
        """
        products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = products.fp32_precision
        if self._device.type == "cpu" and self._body.dtype == torch.bfloat16:
            products.fp32_precision = "bf16"
        try:
            yield
        finally:
            products.fp32_precision = before

    def forget(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def update(self, learning_rate: float) -> float:
        self._add_up()
        norm = float(torch.nn.utils.get_total_norm(p.grad for p in self._parameters if p.grad is not None))
        if math.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(
                self._parameters, self._descent.max_grad_norm, torch.tensor(norm, device=self._device)
            )
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self.forget()
        return norm

    def _add_up(self) -> None:
        """Replaces the gradient by its sum over all processes, in one piece, because the numbers are few."""
        if self.processes.count > 1:
            parts = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in self._parameters]
            flat = torch.cat([part.flatten() for part in parts])
            self.processes.add_up(flat)
            for parameter, part in zip(
                self._parameters, torch.split(flat, [p.numel() for p in parts]), strict=True
            ):
                parameter.grad = part.view_as(parameter)

    def adapter(self) -> Adapter:
        return Adapter({name: layer.pair() for name, layer in self._layers.items()}, self._base_model)

    def put(self, adapter: Adapter) -> None:
        with torch.no_grad():
            for name, layer in self._layers.items():
                layer.a.copy_(_tensor(adapter.pairs[name].a))
                layer.b.copy_(_tensor(adapter.pairs[name].b))

    def state(self) -> State:
        state: dict[str, np.ndarray] = {}
        for name, parameter in self._named():
            state[name] = _array(parameter)
            moments = self._optimizer.state.get(parameter)
            if moments:
                state[f"{name}.mean"] = _array(moments["exp_avg"])
                state[f"{name}.square"] = _array(moments["exp_avg_sq"])
                state[f"{name}.steps"] = _array(moments["step"])
        return state

    def restore(self, state: State) -> None:
        for name, parameter in self._named():
            if name not in state or state[name].shape != tuple(parameter.shape):
                raise ValueError(f"{name} is missing or has another shape")
            with torch.no_grad():
                parameter.copy_(_tensor(state[name]))
            self._optimizer.state.pop(parameter, None)
            if f"{name}.mean" in state:
                self._optimizer.state[parameter] = {
                    "step": _tensor(state[f"{name}.steps"]),
                    "exp_avg": _tensor(state[f"{name}.mean"]).to(self._device),
                    "exp_avg_sq": _tensor(state[f"{name}.square"]).to(self._device),
                }

    def peak_memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return peak_memory()

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, layer in self._layers.items():
            yield f"{name}.lora_A", layer.a
            yield f"{name}.lora_B", layer.b


class TorchEntropyLearner(TorchLearner, EntropyLearner):
    """A learner that trains a LoRA adapter on the entropy of answers' tokens."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        descent: Descent,
        objective: EntropyObjective,
        *,
        checkpointing: bool = False,
    ) -> None:
        """Sets up the learner; see `TorchLearner`."""
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


class TorchPolicyLearner(TorchLearner, PolicyLearner):
    """A learner that trains a LoRA adapter by policy gradients of drawn answers.

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
        """Sets up the learner; see `TorchLearner`.

        `temperature`: at which answers are drawn, and therefore the policy's own.
        """
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
        """Returns the answers' tokens, [M] int64."""
        return torch.tensor([token for each in batch for token in each.answer], device=self._device)

    def _tensor(self, array: Floats) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _optional(self, array: Floats | None) -> Tensor | None:
        return None if array is None else self._tensor(array)


def _head(model: nn.Module, body: nn.Module) -> Tensor:
    """Returns the weights that turn hidden states into logits, [V, H].

    On a CPU they are float32 in every model. A product of bfloat16 there has bfloat16 logits, whose entropy
    is off by some per cent. oneDNN multiplies float32 in bfloat16 as fast (docs/decisions.md).

    Raises ModelError if the logits are not their plain product: some models scale or bend them.
    """
    head = model.get_submodule("lm_head")
    if not isinstance(head, nn.Linear):
        raise ModelError("EM-FT cannot train this model: its head is not a linear layer")
    weight = head.weight.detach()
    with torch.no_grad():
        tokens = torch.arange(min(4, len(weight)), device=weight.device).unsqueeze(0)
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        ours = body(input_ids=tokens, use_cache=False).last_hidden_state.float() @ weight.float().T
    if (logits - ours).abs().max() > 0.02 * logits.abs().max():  # what bfloat16 rounds is less
        raise ModelError("EM-FT cannot train this model: its logits are not the plain product of its head")
    return weight.float() if weight.device.type == "cpu" else weight


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().copy()


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))
