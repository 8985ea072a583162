"""`--dry-run`: what would happen, tried out on a small part of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from emlocal.backends.base import Backend
from emlocal.training.batching import MicroBatches
from emlocal.training.engines import L, Objective
from emlocal.training.loop import prompts_of_step
from emlocal.training.options import Setup
from emlocal.training.rollouts import Rollout, draw_rollouts
from emlocal.training.runner import Prepared, prepared
from emlocal.training.settings import TrainingSettings
from emlocal.training.watching import View

_TOKENS = 48
"""Of the answers that are tried out."""


@dataclass(frozen=True)
class Trial:
    """What a run would be, and what it would take if every answer were as long as it may get."""

    settings: TrainingSettings
    context: int
    token_budget: int
    fitting: int
    """Prompts that leave room for an answer …"""
    prompts: int
    """… out of so many."""
    described: tuple[str, str, str]
    """Model, adapter and engine, in words."""
    example: tuple[tuple[str, int], tuple[str, int]]
    """Prompt and answer: text, and tokens."""
    answering_speed: float
    """Tokens a second."""
    training_speed: float
    """Tokens a second, prompts included."""
    step_seconds: float
    run_seconds: float
    peak_memory: int
    """Bytes, with one whole micro-batch."""


def try_out(objective: Objective[L], setup: Setup, view: View | None = None) -> Trial | None:
    """Try a run; None in a process that leaves that to another one.

    Raises what loading raises, and UsageError for settings, prompts or a model that cannot be used.
    """
    with prepared(objective, setup, view or View(), dry=True) as run:
        return _try(run) if run.engines.learner.processes.rank == 0 else None


def _try(run: Prepared[Any]) -> Trial:
    engines, method, settings = run.engines, run.method, run.objective.settings
    chosen = prompts_of_step(len(run.tokens), 0, settings)
    chosen = chosen[: max(1, engines.answerer.parallel // method.samples)]
    short = replace(settings, max_tokens=min(_TOKENS, settings.max_tokens))
    run.view.loading("trying out a step", 0, None)
    started = time.perf_counter()
    rollouts = draw_rollouts(
        engines.answerer.backend,
        [run.tokens[i] for i in chosen],
        short,
        0,
        engines.answerer.parallel,
        samples=method.samples,
    )
    answering = time.perf_counter() - started
    answered = sum(len(r.answer) for r in rollouts)
    prompts, batch = _whole_batch(chosen, rollouts, method.samples, settings, run.setup.machine.token_budget)
    trained, training = sum(len(r) for r in batch), _seconds_of_training(run, prompts, batch)
    n = settings.answers_per_step
    longest = settings.max_tokens + sum(len(r.prompt) for r in rollouts) / len(rollouts)
    answers, gradient = n * settings.max_tokens * answering / answered, n * longest * training / trained
    first, backend = rollouts[0], engines.answerer.backend
    return Trial(
        settings,
        backend.context,
        run.setup.machine.token_budget,
        len(run.tokens),
        run.prompts,
        engines.describe(),
        (
            (_text(backend, first.prompt), len(first.prompt)),
            (_text(backend, first.answer), len(first.answer)),
        ),
        answered / answering,
        trained / training,
        answers + gradient,
        settings.steps * (answers + gradient) + answers,  # the last adapter's answers are looked at too
        engines.learner.peak_memory(),
    )


def _seconds_of_training(run: Prepared[Any], prompts: Sequence[int], batch: Sequence[Rollout]) -> float:
    """Of the gradients of one micro-batch."""
    learner = run.engines.learner
    batches = MicroBatches(
        run.setup.machine.token_budget, learner.forget, lambda: False, lambda *_: None, run.view.warn
    )
    started = time.perf_counter()
    for _ in run.method.gradients(0, prompts, batch, batches):
        learner.forget()
    return time.perf_counter() - started


def _whole_batch(
    chosen: Sequence[int],
    rollouts: Sequence[Rollout],
    samples: int,
    settings: TrainingSettings,
    budget: int,
) -> tuple[list[int], list[Rollout]]:
    """As many answers as a micro-batch takes, each stretched to the longest by saying it again: whole
    groups, and so one at least."""
    length = settings.max_tokens
    long = [replace(r, answer=(r.answer * length)[:length]) for r in rollouts]
    groups = min(len(chosen), max(1, budget // max(map(len, long)) // samples))
    return list(chosen[:groups]), long[: groups * samples]


def _text(backend: Backend, tokens: Sequence[int]) -> str:
    return b"".join(backend.token_bytes(t) or f"<{t}>".encode() for t in tokens).decode(errors="replace")
