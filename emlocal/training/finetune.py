"""The EM-FT loop: answer prompts, look at the answers, follow the gradient of their entropy, again.

Everything random is addressed by seed and step, so a run that is stopped anywhere and resumed has the same
weights, bit for bit, as one that was not (on a CPU, with the same engines and threads).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from emlocal.backends.base import Backend
from emlocal.backends.learner import Learner, OutOfMemoryError, Terms
from emlocal.errors import CancelledError, EmlocalError
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.sampling.draw import request_key
from emlocal.training.batching import micro_batches, token_weights
from emlocal.training.checkpoint import Arrays, Checkpoint
from emlocal.training.folder import RunFolder
from emlocal.training.guards import Guards
from emlocal.training.rollouts import Rollout, RolloutStats, describe, draw_rollouts
from emlocal.training.settings import FineTuneSettings, TrainingSettings

MOST_SKIPPED = 3
"""Steps in a row whose gradient is not finite, before the run stops."""


class Answerer(Protocol):
    """The engine that answers the prompts."""

    @property
    def backend(self) -> Backend:
        """Has `parallel` and `SPARE_SEQUENCES` sequences, each with room of its own."""

    @property
    def parallel(self) -> int:
        """Answers at once."""

    def refresh(self, adapter: Adapter) -> None:
        """Answer with this adapter from now on."""


class Watcher(Protocol):
    """Is told how a run goes."""

    def answering(self, step: int, done: int, total: int) -> None:
        """Prompts of this step answered."""

    def training(self, step: int, done: int, total: int) -> None:
        """Answers of this step trained on."""

    def finished_step(self, row: dict[str, Any]) -> None:
        """A line of metrics."""

    def warn(self, text: str) -> None:
        """Something that people should know."""


@dataclass(frozen=True)
class Plan:
    """What a run is besides its settings: how it is carried out."""

    token_budget: int = 2048
    """Tokens of a micro-batch, padding included."""
    save_every: int = 5
    """Steps between checkpoints."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended. The adapter is in its folder."""

    reason: Literal["finished", "collapsed", "not finite"]
    message: str
    steps: int
    """Optimizer steps of the adapter that was kept."""
    first: RolloutStats | None
    """The answers at the first step …"""
    last: RolloutStats | None
    """… and those of the adapter that was kept."""


def prompts_of_step(count: int, step: int, settings: TrainingSettings) -> list[int]:
    """Indices of a step's prompts: all of them in a random order, then in another one, and so on."""
    first = step * settings.prompts_per_step
    places = range(first, first + settings.prompts_per_step)
    orders: dict[int, list[int]] = {}
    for epoch in {place // count for place in places}:
        key = np.array([settings.seed, request_key(f"epoch {epoch}")], dtype=np.uint64)
        orders[epoch] = np.random.Generator(np.random.Philox(key=key)).permutation(count).tolist()
    return [orders[place // count][place % count] for place in places]


@dataclass
class _Progress:
    """What a run remembers from step to step, beside the learner."""

    guards: Guards
    good: Adapter
    good_step: int = 0
    kl: float = 0.0
    """Of the step before, nats a token."""
    skipped: int = 0
    token_budget: int = 0
    first: RolloutStats | None = None
    last: RolloutStats | None = None
    """Of `good`."""

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "guards": list(self.guards.history),
            "good_step": self.good_step,
            "kl": self.kl,
            "skipped": self.skipped,
            "token_budget": self.token_budget,
            "first": self.first and asdict(self.first),
            "last": self.last and asdict(self.last),
        }


@dataclass
class FineTune:
    """One run. `run` may be called once."""

    settings: FineTuneSettings
    plan: Plan
    prompts: Sequence[Sequence[int]]
    """Token ids."""
    learner: Learner
    answerer: Answerer
    folder: RunFolder
    watcher: Watcher
    cancelled: Callable[[], bool] = lambda: False
    _now: _Progress = field(init=False)

    def run(self, start: Checkpoint | None = None) -> Outcome:
        """From the beginning, or from a checkpoint, to the end.

        Raises CancelledError after writing a checkpoint of the step before; EmlocalError where a checkpoint
        cannot be written, or where a single answer does not fit into memory.
        """
        step = self._restore(start)
        while True:
            before = self._now.as_json()
            try:
                outcome = self._step(step)
            except CancelledError:
                self.learner.forget()
                self._save(step, before)
                raise
            if outcome is not None:
                self.folder.put_adapter(self._now.good)
                return outcome
            step += 1
            if step % self.plan.save_every == 0:
                self._save(step, self._now.as_json())

    @property
    def kept(self) -> Adapter:
        """The last adapter whose answers passed the guards."""
        return self._now.good

    def _restore(self, start: Checkpoint | None) -> int:
        guards = Guards(self.settings)
        self._now = _Progress(guards, self.learner.adapter(), token_budget=self.plan.token_budget)
        if start is None:
            return 0
        self.learner.restore(start.learner)
        held = dict(start.history)
        guards.history = list(held.pop("guards"))
        first, last = (held[name] and RolloutStats(**held[name]) for name in ("first", "last"))
        good = _adapter(start.good, self._now.good)
        self._now = _Progress(guards, good, **{**held, "first": first, "last": last})
        return start.step

    def _save(self, step: int, history: dict[str, Any]) -> None:
        self.folder.save(Checkpoint(step, self.learner.state(), _arrays(self._now.good), history))
        self.folder.put_adapter(self._now.good)

    def _step(self, step: int) -> Outcome | None:
        """Answers of the model as it is, a look at them, an optimizer step. The outcome, at the end."""
        now, adapter, started = self._now, self.learner.adapter(), time.perf_counter()
        self.answerer.refresh(adapter)
        rollouts = self._answers(step)
        answered = time.perf_counter()
        stats = describe(rollouts)
        now.first = now.first or stats
        why = now.guards.look(stats, now.kl)
        if why is not None:
            return self._outcome("collapsed", f"{why}; the adapter of step {now.good_step} was kept")
        now.good, now.good_step, now.last = adapter, step, stats
        if step == self.settings.steps:
            self._report(step, stats, None, {"rollout_seconds": answered - started})
            return self._outcome("finished", f"{step} steps")
        terms = self._gradient(step, rollouts)
        rate = self.settings.learning_rate_at(step)
        norm = self.learner.update(rate)
        now.kl = terms.kl / terms.tokens
        now.skipped = 0 if math.isfinite(norm) else now.skipped + 1
        self._report(
            step,
            stats,
            terms,
            {
                "learning_rate": rate,
                "gradient_norm": norm if math.isfinite(norm) else None,
                "rollout_seconds": answered - started,
                "train_seconds": time.perf_counter() - answered,
            },
        )
        if now.skipped:
            self.watcher.warn(f"step {step}: the gradient is not finite; nothing was changed")
        if now.skipped >= MOST_SKIPPED:
            return self._outcome("not finite", f"{MOST_SKIPPED} gradients in a row were not finite")
        return None

    def _answers(self, step: int) -> list[Rollout]:
        chosen = prompts_of_step(len(self.prompts), step, self.settings)
        return draw_rollouts(
            self.answerer.backend,
            [self.prompts[i] for i in chosen],
            self.settings,
            step,
            self.answerer.parallel,
            cancelled=self.cancelled,
            progress=lambda done: self.watcher.answering(step, done, len(chosen)),
        )

    def _gradient(self, step: int, rollouts: Sequence[Rollout]) -> Terms:
        """The gradient of the whole step, in micro-batches that fit."""
        weights = token_weights(rollouts, self.settings.normalize)
        lengths = [len(rollout) for rollout in rollouts]
        while True:
            try:
                return self._accumulate(
                    step, rollouts, weights, micro_batches(lengths, self._now.token_budget)
                )
            except OutOfMemoryError:
                self.learner.forget()
                if self._now.token_budget < max(lengths):
                    raise EmlocalError(
                        f"an answer of {max(lengths):,} tokens does not fit into memory by itself",
                        "give a smaller --max-tokens, or --gradient-checkpointing",
                    ) from None
                self._now.token_budget //= 2
                self.watcher.warn(
                    f"out of memory: going on with micro-batches of {self._now.token_budget:,} tokens"
                )

    def _accumulate(
        self, step: int, rollouts: Sequence[Rollout], weights: Sequence[float], batches: list[list[int]]
    ) -> Terms:
        total, done = Terms(0, 0.0, 0.0, 0.0), 0
        for batch in batches:
            if self.cancelled():
                raise CancelledError
            total += self.learner.accumulate([rollouts[i] for i in batch], [weights[i] for i in batch])
            done += len(batch)
            self.watcher.training(step, done, len(rollouts))
        return total

    def _report(self, step: int, stats: RolloutStats, terms: Terms | None, more: dict[str, Any]) -> None:
        row: dict[str, Any] = {"step": step, **asdict(stats)}
        if terms is not None:
            row |= {
                "loss": terms.loss,
                "loss_entropy": terms.entropy / terms.tokens,
                "kl": terms.kl / terms.tokens,
                "token_budget": self._now.token_budget,
            }
        row |= more
        self.folder.add_metrics(row)
        self.watcher.finished_step(row)

    def _outcome(self, reason: Literal["finished", "collapsed", "not finite"], message: str) -> Outcome:
        now = self._now
        return Outcome(reason, message, now.good_step, now.first, now.last)


def _arrays(adapter: Adapter) -> Arrays:
    arrays = {f"{name}.lora_A": pair.a for name, pair in adapter.pairs.items()}
    return arrays | {f"{name}.lora_B": pair.b for name, pair in adapter.pairs.items()}


def _adapter(arrays: Arrays, like: Adapter) -> Adapter:
    """The adapter of a checkpoint; scales are those of the run."""
    return Adapter(
        {
            name: LoraPair(arrays[f"{name}.lora_A"], arrays[f"{name}.lora_B"], pair.scale)
            for name, pair in like.pairs.items()
        },
        like.base_model,
    )
