"""`emlocal finetune --dry-run`: what would happen, tried out on a small part of it."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from emlocal import console
from emlocal.cli.finetune_options import AnswerOptions, MachineOptions
from emlocal.models.storage import human_size
from emlocal.settings import settings_of
from emlocal.training.batching import micro_batches, token_weights
from emlocal.training.finetune import prompts_of_step
from emlocal.training.prompts import Prompt
from emlocal.training.rollouts import Rollout, draw_rollouts
from emlocal.training.settings import FineTuneSettings
from emlocal.words import counted

if TYPE_CHECKING:
    from emlocal.cli.finetune_engines import Engines

_TOKENS = 48
"""Of the answers that are tried out."""
_FIELDS = {"schedule": "--schedule", "target_modules": "--target-modules", "normalize": "--normalize"}


def show(
    engines: "Engines",
    prompts: Sequence[Prompt],
    settings: FineTuneSettings,
    answers: AnswerOptions,
    machine: MachineOptions,
) -> None:
    """Print the settings, one example as it would be trained on, and what a run takes."""
    tokens = engines.tokens_of(prompts, answers.system, settings.max_tokens)
    console.heading("Settings")
    for name, value in asdict(settings).items():
        flag = _FIELDS.get(name) or settings_of(FineTuneSettings)[name].flag
        said = ",".join(value) if isinstance(value, tuple) else value
        console.write(f"  {flag:<21} {said}\n")
    console.write(f"  {'prompts':<21} {len(tokens):,} of {len(prompts):,}\n")
    console.write(f"  {'engines':<21} {engines.describe()}\n")

    chosen = prompts_of_step(len(tokens), 0, settings)[: engines.answerer.parallel]
    short = replace(settings, max_tokens=min(_TOKENS, settings.max_tokens))
    started = time.perf_counter()
    rollouts = draw_rollouts(
        engines.answerer.backend, [tokens[i] for i in chosen], short, 0, engines.answerer.parallel
    )
    answering = time.perf_counter() - started
    console.heading("One example")
    _show_example(engines, rollouts[0])

    started = time.perf_counter()
    weights = token_weights(rollouts, settings.normalize)
    for batch in micro_batches([len(r) for r in rollouts], machine.token_budget):
        engines.learner.accumulate([rollouts[i] for i in batch], [weights[i] for i in batch])
    training = time.perf_counter() - started
    engines.learner.forget()
    console.heading("A run")
    _show_costs(engines, settings, rollouts, answering, training)


def _show_example(engines: "Engines", rollout: Rollout) -> None:
    """The prompt, which is not in the loss, and the answer, which is."""
    backend = engines.answerer.backend

    def text(tokens: Sequence[int]) -> str:
        return b"".join(backend.token_bytes(t) or f"<{t}>".encode() for t in tokens).decode(errors="replace")

    console.write(f"  not in the loss ({counted(len(rollout.prompt), 'token')}; <n> is control token n):\n")
    console.write(_indented(text(rollout.prompt)))
    console.write(f"  in the loss ({counted(len(rollout.answer), 'token')} of an answer cut short here):\n")
    console.write(_indented(text(rollout.answer)))


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.translate(console.CONTROLS).splitlines())


def _show_costs(
    engines: "Engines",
    settings: FineTuneSettings,
    rollouts: Sequence[Rollout],
    answering: float,
    training: float,
) -> None:
    """Times of whole steps from those of the small one, for answers as long as they may get."""
    n = len(rollouts)
    answered = sum(len(r.answer) for r in rollouts)
    trained = sum(len(r) for r in rollouts)
    longest = settings.max_tokens + sum(len(r.prompt) for r in rollouts) / n
    seconds = settings.prompts_per_step * (
        settings.max_tokens * answering / answered + longest * training / trained
    )
    console.write(f"  answering             {answered / answering:,.0f} tokens/s\n")
    console.write(f"  training              {trained / training:,.0f} tokens/s, prompts included\n")
    console.write(
        f"  a step                at most {_duration(seconds)}"
        f" ({settings.prompts_per_step:,} answers of {settings.max_tokens:,} tokens)\n"
    )
    whole = seconds * (settings.steps + 1)  # the last adapter's answers are looked at too
    console.write(f"  {counted(settings.steps, 'step'):<21} at most {_duration(whole)}\n")
    console.write(f"  {'memory':<21} {human_size(engines.learner.peak_memory())} so far, at most\n")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
