"""The training loop of all methods: answer prompts, check the answers, follow a gradient, repeat.

All random numbers depend on the seed and the step. So a run that was stopped and resumed has the same
weights, bit for bit, as an uninterrupted one (on a CPU, with the same engines and threads).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from emlocal.backends.base import Backend
from emlocal.backends.learner import Learner, Processes
from emlocal.errors import CancelledError, EmlocalError
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.sampling.draw import request_key
from emlocal.text import counted
from emlocal.training.checkpoint import Arrays, Checkpoint
from emlocal.training.folder import OthersFolder, RunFolder
from emlocal.training.rollouts import Guards, MicroBatches, Rollout, RolloutStats, describe, draw_rollouts
from emlocal.training.settings import TrainingSettings

MOST_SKIPPED = 3
"""Number of consecutive steps with a gradient that is not finite after which the run stops."""


class Answerer(Protocol):
    """The engine that answers the prompts."""

    @property
    def backend(self) -> Backend:
        """The engine. It has `parallel` + `SPARE_SEQUENCES` sequences, each with room of its own."""

    @property
    def parallel(self) -> int:
        """Number of answers at once."""

    def refresh(self, adapter: Adapter) -> None:
        """Uses this adapter from now on."""


class Watcher(Protocol):
    """Receives reports about a run."""

    def answering(self, step: int, done: int, total: int) -> None:
        """Reports how many answers of this step are drawn."""

    def training(self, step: int, done: int, total: int) -> None:
        """Reports how many answers of this step are processed: scored, or trained on."""

    def finished_step(self, row: dict[str, Any]) -> None:
        """Receives a line of metrics."""

    def warn(self, text: str) -> None:
        """Warns people."""


@dataclass(frozen=True)
class Gradient:
    """Facts about the gradient in the learner, before the learner follows it."""

    kl: float | None
    """KL of the answers to the base, in nats a token; None if it is not measured."""
    row: dict[str, Any]
    """Numbers for the metrics."""


class Method(Protocol):
    """Turns answers into gradients: EM-FT, EM-RL, vote distillation."""

    @property
    def samples(self) -> int:
        """Number of answers to each prompt."""

    @property
    def draws_once(self) -> bool:
        """Whether the answers are drawn before the first step rather than in each (see `prepare`)."""

    def prepare(
        self,
        answerer: "Answerer",
        prompts: Sequence[Sequence[int]],
        folder: Path,
        cancelled: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> str | None:
        """Prepares the first step. Returns a summary for people, or None.

        `progress` receives the number of answers drawn, and the total. Raises CancelledError, and
        EmlocalError if there is nothing to train on.
        """

    def taught(self, step: int) -> Sequence[Rollout] | None:
        """Returns a step's answers, or None if the model must draw them."""

    def identity(self) -> dict[str, Any]:
        """Returns what determines the outcome besides the prompts' tokens, as JSON."""

    def gradients(
        self, step: int, chosen: Sequence[int], rollouts: Sequence[Rollout], batches: MicroBatches
    ) -> Iterator[Gradient]:
        """Computes one gradient after the other in the learner; each belongs to one update.

        The learner makes the update before the next gradient. `chosen`: the places of the step's prompts in
        the data. `rollouts`: `samples` answers to each prompt, one prompt after the other.
        """


@dataclass(frozen=True)
class Plan:
    """Settings for carrying out a run, beside those that determine its outcome."""

    token_budget: int = 2048
    """Tokens of a micro-batch, padding included."""
    save_every: int = 5
    """Steps between checkpoints."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run. The adapter is in its folder."""

    reason: Literal["finished", "collapsed", "not finite"]
    message: str
    steps: int
    """Number of steps behind the adapter that was kept."""
    first: RolloutStats | None
    """Statistics of the answers at the first step; None if the steps draw none."""
    last: RolloutStats | None
    """Statistics of the kept adapter's answers; None if the steps draw none."""


def prompts_of_step(count: int, step: int, settings: TrainingSettings) -> list[int]:
    """Returns the indices of a step's prompts. Each epoch takes all prompts in a new random order."""
    first = step * settings.prompts_per_step
    places = range(first, first + settings.prompts_per_step)
    orders: dict[int, list[int]] = {}
    for epoch in {place // count for place in places}:
        key = np.array([settings.seed, request_key(f"epoch {epoch}")], dtype=np.uint64)
        orders[epoch] = np.random.Generator(np.random.Philox(key=key)).permutation(count).tolist()
    return [orders[place // count][place % count] for place in places]


@dataclass
class _Progress:
    """The state that a run carries from step to step, beside the learner."""

    guards: Guards
    good: Adapter
    good_step: int = 0
    skipped: int = 0
    first: RolloutStats | None = None
    last: RolloutStats | None = None
    """Statistics of `good`'s answers."""

    def as_json(self, token_budget: int) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {
            "guards": list(self.guards.history),
            "good_step": self.good_step,
            "skipped": self.skipped,
            "token_budget": token_budget,
            "first": self.first and asdict(self.first),
            "last": self.last and asdict(self.last),
        }


@dataclass
class Run:
    """One run of a method. `run` may be called once."""

    settings: TrainingSettings
    plan: Plan
    prompts: Sequence[Sequence[int]]
    """Token ids."""
    method: Method
    learner: Learner
    answerer: Answerer
    folder: RunFolder | OthersFolder
    watcher: Watcher
    cancelled: Callable[[], bool] = lambda: False
    processes: Processes = field(default_factory=Processes)
    _now: _Progress = field(init=False)
    _batches: MicroBatches = field(init=False)

    def run(self, start: Checkpoint | None = None) -> Outcome:
        """Runs from the beginning, or from a checkpoint, to the end.

        Raises CancelledError after writing a checkpoint of the step before. Raises EmlocalError if a
        checkpoint cannot be written, or if a single answer does not fit into memory.
        """
        step = self._restore(start)
        while True:
            before, good, state = self._history(), self._now.good, self.learner.state()
            try:
                outcome = self._step(step)
            except CancelledError:
                self.learner.forget()
                self.learner.restore(state)  # the cancellation may have come between two updates of the step
                self._now.good = good
                self._save(step, before)
                raise
            if outcome is not None:
                self.folder.put_adapter(self._now.good)
                return outcome
            step += 1
            if step % self.plan.save_every == 0 or step == self.settings.steps:
                self._save(step, self._history())

    @property
    def kept(self) -> Adapter:
        """The last adapter whose answers passed the guards."""
        return self._now.good

    def _restore(self, start: Checkpoint | None) -> int:
        guards = Guards(self.settings)
        self._now = _Progress(guards, self.learner.adapter())
        budget = self.plan.token_budget
        if start is not None:
            try:
                self.learner.restore(start.learner)
                held = dict(start.history)
                guards.history = list(held.pop("guards"))
                first, last = (held[name] and RolloutStats(**held[name]) for name in ("first", "last"))
                budget = held.pop("token_budget")
                good = _adapter(start.good, self._now.good)
                self._now = _Progress(guards, good, **{**held, "first": first, "last": last})
            except (KeyError, TypeError, ValueError) as why:
                raise EmlocalError(
                    f"the checkpoint of step {start.step} does not belong to this run: {why}",
                    "delete it, then resume again",
                ) from why
        if self.plan.token_budget < budget:
            self.watcher.warn(
                f"continuing with micro-batches of {self.plan.token_budget:,} tokens instead of"
                f" {budget:,}; the weights' last bits will differ from an uninterrupted run's"
            )
            budget = self.plan.token_budget
        self._batches = MicroBatches(
            budget,
            self.learner.forget,
            self.cancelled,
            self.watcher.training,
            self.watcher.warn,
            self.processes,
        )
        return start.step if start else 0

    def _history(self) -> dict[str, Any]:
        return self._now.as_json(self._batches.budget)

    def _save(self, step: int, history: dict[str, Any]) -> None:
        self.folder.save(Checkpoint(step, self.learner.state(), _arrays(self._now.good), history))
        self.folder.put_adapter(self._now.good)

    def _step(self, step: int) -> Outcome | None:
        """Draws answers, checks them and makes the updates. Returns the outcome if the run ends here."""
        now, adapter, started = self._now, self.learner.adapter(), time.perf_counter()
        chosen, last = prompts_of_step(len(self.prompts), step, self.settings), step == self.settings.steps
        taught = self.method.taught(step)
        if taught is None:
            self.answerer.refresh(adapter)
        rollouts = self._answers(step, chosen) if taught is None else taught
        answered = time.perf_counter()
        found = describe(rollouts)
        row: dict[str, Any] = {"step": step, **asdict(found), "rollout_seconds": answered - started}
        if taught is None:
            row["rollout_tokens_per_second"] = found.tokens / row["rollout_seconds"]
            stats: RolloutStats | None = found
            why = now.guards.look(found)
            now.first = now.first or found
        else:
            stats, why = None, None
            now.guards.pass_over()
        if why is not None or last:
            self._report(row)
            return self._collapsed(why) if why is not None else self._finished(step, adapter, stats)
        gradients = self.method.gradients(step, chosen, rollouts, self._batches)
        gradient = next(gradients)
        if gradient.kl is not None:
            why = now.guards.look_at_kl(gradient.kl)
        row |= {**gradient.row, "kl": gradient.kl, "token_budget": self._batches.budget}
        if why is not None:
            self.learner.forget()
            self._report(row)
            return self._collapsed(why)
        self._keep_if_sound(step, adapter, stats)
        row |= self._update(step, gradients)
        seconds = time.perf_counter() - answered
        speed = sum(map(len, rollouts)) / seconds
        self._report(row | {"train_seconds": seconds, "train_tokens_per_second": speed})
        return self._not_finite(step, row["gradient_norm"])

    def _answers(self, step: int, chosen: Sequence[int]) -> list[Rollout]:
        total, processes = len(chosen) * self.method.samples, self.processes
        self.watcher.answering(step, 0, total)  # before the first answer, which may take long
        own = range(processes.rank, len(chosen), processes.count)
        drawn: list[Rollout] | None = None
        with suppress(CancelledError):  # the other processes must learn of it below
            drawn = draw_rollouts(
                self.answerer.backend,
                [self.prompts[chosen[place]] for place in own],
                self.settings,
                step,
                self.answerer.parallel,
                places=own,
                samples=self.method.samples,
                cancelled=self.cancelled,
                progress=lambda done: self.watcher.answering(step, min(done * processes.count, total), total),
            )
        everyone = processes.gather(drawn)
        return _in_order(everyone, len(chosen), self.method.samples)

    def _update(self, step: int, further: Iterator[Gradient]) -> dict[str, Any]:
        """Follows the current gradient and all later ones of the step. Returns numbers for the metrics."""
        rate = self.settings.learning_rate_at(step)
        longest, row = self.learner.update(rate), {}
        for gradient in further:
            row = gradient.row
            norm = self.learner.update(rate)
            longest = norm if not norm <= longest else longest  # true for NaN too
        return {**row, "learning_rate": rate, "gradient_norm": longest}

    def _not_finite(self, step: int, norm: float) -> Outcome | None:
        """Counts consecutive steps whose gradient is not finite. Returns the outcome if they are too many."""
        now = self._now
        now.skipped = 0 if math.isfinite(norm) else now.skipped + 1
        if now.skipped:
            self.watcher.warn(f"step {step}: a gradient is not finite and was left out")
        if now.skipped >= MOST_SKIPPED:
            return self._outcome("not finite", f"{MOST_SKIPPED} gradients in a row were not finite")
        return None

    def _report(self, row: dict[str, Any]) -> None:
        row = {name: None if _is_endless(value) else value for name, value in row.items()}
        self.folder.add_metrics(row)
        self.watcher.finished_step(row)

    def _keep_if_sound(self, step: int, adapter: Adapter, stats: RolloutStats | None) -> None:
        now = self._now
        if now.guards.sound:
            now.good, now.good_step, now.last = adapter, step, stats

    def _finished(self, step: int, adapter: Adapter, stats: RolloutStats | None) -> Outcome:
        self._keep_if_sound(step, adapter, stats)
        message, kept = counted(step, "step"), self._now.good_step
        if kept != step:
            message += f"; the last answers exceed a limit: the adapter of step {kept} was kept"
        return self._outcome("finished", message)

    def _collapsed(self, why: str) -> Outcome:
        return self._outcome("collapsed", f"{why}; the adapter of step {self._now.good_step} was kept")

    def _outcome(self, reason: Literal["finished", "collapsed", "not finite"], message: str) -> Outcome:
        now = self._now
        return Outcome(reason, message, now.good_step, now.first, now.last)


def _in_order(everyone: Sequence[list[Rollout] | None], prompts: int, samples: int) -> list[Rollout]:
    """Returns the answers of all processes in order; process r of n took the prompts r, r + n, ….

    An entry of None means that the process was cancelled. Raises CancelledError if any was.
    """
    rollouts: list[Rollout] = []
    for place in range(prompts):
        theirs = everyone[place % len(everyone)]
        if theirs is None:
            raise CancelledError
        first = place // len(everyone) * samples
        rollouts += theirs[first : first + samples]
    return rollouts


def _is_endless(value: Any) -> bool:
    """Whether the value is a number that JSON lacks: NaN or infinite."""
    return isinstance(value, float) and not math.isfinite(value)


def _arrays(adapter: Adapter) -> Arrays:
    arrays = {f"{name}.lora_A": pair.a for name, pair in adapter.pairs.items()}
    return arrays | {f"{name}.lora_B": pair.b for name, pair in adapter.pairs.items()}


def _adapter(arrays: Arrays, like: Adapter) -> Adapter:
    """Returns a checkpoint's adapter, with the scales of the run."""
    return Adapter(
        {
            name: LoraPair(arrays[f"{name}.lora_A"], arrays[f"{name}.lora_B"], pair.scale)
            for name, pair in like.pairs.items()
        },
        like.base_model,
    )
