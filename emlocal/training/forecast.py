"""How long a run will take, from a trial of a few seconds before it begins.

`emlocal rl --dry-run` measures the same on whole micro-batches, and tells more.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from emlocal.text import counted, long_run
from emlocal.training.engines import Engines
from emlocal.training.loop import Method, prompts_of_step
from emlocal.training.rollouts import MicroBatches, Rollout, draw_rollouts

_TOKENS = 9
"""The trial's answers have so many tokens each."""
_TRAINED = 256
"""Tokens of the trial's micro-batch, if one prompt's answers have no more."""
NEVER_LONG = 10_000
"""A run of no more tokens takes less than ten minutes on any machine that would be used for it: no trial."""


@dataclass(frozen=True)
class Forecast:
    """Seconds of one prompt read, one token written and one token trained on."""

    reading: float
    writing: float
    training: float

    def seconds(self, prompts: int, answers: int, trained: int, longest: int, prompt_length: float) -> float:
        """What a run takes if every answer has `longest` tokens; `trained`: answers trained on."""
        answering = prompts * self.reading + answers * longest * self.writing
        return answering + trained * (prompt_length + longest) * self.training


def forecast(
    engines: Engines[Any],
    method: Method,
    tokens: Sequence[Sequence[int]],
    steps: int,
    *,
    budget: int,
    cancelled: Callable[[], bool],
) -> list[str]:
    """Lines that say how long the run will take; none for a run of less than ten minutes.

    Args:
        tokens: the prompts.
        steps: that are left.
        budget: tokens of a micro-batch.
    Raises:
        CancelledError: Ctrl-C during the trial.
    """
    settings = engines.settings
    trained = steps * settings.answers_per_step
    prompts = len(tokens) if method.draws_once else steps * settings.prompts_per_step
    answers = prompts * method.samples
    if max(answers, trained) * settings.max_tokens <= NEVER_LONG:
        return []
    length = sum(map(len, tokens)) / len(tokens)
    measured = _measured(engines, method, tokens, budget, cancelled)
    fewer = "--limit" if method.draws_once else "--prompts-per-step"
    several = ", --samples" if method.samples > 1 else ""
    return long_run(
        measured.seconds(prompts, answers, trained, settings.max_tokens, length),
        f"{counted(steps, 'step')}, {counted(answers, 'answer')} of up to"
        f" {counted(settings.max_tokens, 'token')} each",
        f"--steps, {fewer}{several} or --max-tokens",
    )


def _measured(
    engines: Engines[Any],
    method: Method,
    tokens: Sequence[Sequence[int]],
    budget: int,
    cancelled: Callable[[], bool],
) -> Forecast:
    settings, answerer = engines.settings, engines.answerer
    chosen = prompts_of_step(len(tokens), 0, settings)
    chosen = chosen[: max(1, answerer.parallel // method.samples)]

    def answered(length: int) -> tuple[list[Rollout], float]:
        began = time.perf_counter()
        found = draw_rollouts(
            answerer.backend,
            [tokens[i] for i in chosen],
            replace(settings, max_tokens=min(length, settings.max_tokens)),
            0,
            answerer.parallel,
            samples=method.samples,
            cancelled=cancelled,
        )
        return found, time.perf_counter() - began

    _, reading = answered(1)
    rollouts, seconds = answered(_TOKENS)
    written = sum(len(rollout.answer) - 1 for rollout in rollouts)
    writing = max(0.0, seconds - reading) / max(1, written)
    batches = MicroBatches(budget, engines.learner.forget, cancelled, lambda *_: None, lambda _: None)
    groups = max(1, min(len(chosen), min(budget, _TRAINED) // max(map(len, rollouts)) // method.samples))
    batch = rollouts[: groups * method.samples]
    began = time.perf_counter()
    for _ in method.gradients(0, chosen[:groups], batch, batches):
        engines.learner.forget()
    training = time.perf_counter() - began
    return Forecast(reading / len(chosen), writing, training / sum(map(len, batch)))
