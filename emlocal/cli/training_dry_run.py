"""`--dry-run`: what would happen, tried out on a small part of it."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from emlocal import console
from emlocal.cli.training_options import MachineOptions
from emlocal.models.storage import human_size
from emlocal.settings import settings_of
from emlocal.text import CONTROLS
from emlocal.training.batching import MicroBatches
from emlocal.training.loop import Method, prompts_of_step
from emlocal.training.rollouts import Rollout, draw_rollouts
from emlocal.training.settings import TrainingSettings
from emlocal.words import counted, plain

if TYPE_CHECKING:
    from emlocal.cli.training_engines import Engines

_TOKENS = 48
"""Of the answers that are tried out."""


def show(
    engines: "Engines[Any]",
    method: Method,
    tokens: Sequence[Sequence[int]],
    prompts: int,
    machine: MachineOptions,
) -> None:
    """Print the settings, one example as it would be trained on, and what a run takes.

    `tokens`: of the prompts that fit, of so many `prompts`.
    """
    settings = engines.settings
    console.heading("Settings")
    for name, value in vars(settings).items():
        _line(_flag(settings, name), _said(value))
    _line("--context", f"{engines.answerer.backend.context:,}")
    _line("--tokens-per-batch", f"{machine.token_budget:,}")
    _line("prompts", f"{len(tokens):,} of {prompts:,}")
    for name, text in zip(("model", "adapter", "engine"), engines.describe(), strict=True):
        _line(name, text)

    chosen = prompts_of_step(len(tokens), 0, settings)
    chosen = chosen[: max(1, engines.answerer.parallel // method.samples)]
    short = replace(settings, max_tokens=min(_TOKENS, settings.max_tokens))
    started = time.perf_counter()
    rollouts = draw_rollouts(
        engines.answerer.backend,
        [tokens[i] for i in chosen],
        short,
        0,
        engines.answerer.parallel,
        samples=method.samples,
    )
    answering = time.perf_counter() - started
    console.heading("One example")
    _show_example(engines, rollouts[0])

    console.heading("A run, if every answer is as long as it may get")
    _show_costs(engines, method, (chosen, rollouts), answering, machine.token_budget)


def _flag(settings: TrainingSettings, name: str) -> str:
    """What people set it with."""
    numbers = settings_of(type(settings))
    return numbers[name].flag if name in numbers else "--" + name.replace("_", "-")


def _line(name: str, text: str) -> None:
    console.write(f"  {name:<21} {text}\n")


def _said(value: Any) -> str:
    if isinstance(value, float):
        return plain(value)
    if not isinstance(value, tuple):
        return str(value)
    return ",".join(each if isinstance(each, str) else f"{each[0]}={plain(each[1])}" for each in value)


def _show_example(engines: "Engines[Any]", rollout: Rollout) -> None:
    """The prompt, which is not in the loss, and the answer, which is."""
    backend = engines.answerer.backend

    def text(tokens: Sequence[int]) -> str:
        return b"".join(backend.token_bytes(t) or f"<{t}>".encode() for t in tokens).decode(errors="replace")

    console.write(f"  not in the loss ({counted(len(rollout.prompt), 'token')}; <n> is control token n):\n")
    console.write(_indented(text(rollout.prompt)))
    console.write(f"  in the loss ({counted(len(rollout.answer), 'token')} of an answer cut short here):\n")
    console.write(_indented(text(rollout.answer)))


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.translate(CONTROLS).splitlines())


def _show_costs(
    engines: "Engines[Any]",
    method: Method,
    tried: tuple[Sequence[int], Sequence[Rollout]],
    answering: float,
    token_budget: int,
) -> None:
    """Times and memory of whole steps, from the short answers and one whole micro-batch of long ones.

    `tried`: prompts by their places, and `method.samples` short answers to each.
    """
    settings, (chosen, rollouts) = engines.settings, tried
    answered = sum(len(r.answer) for r in rollouts)
    prompts, batch = _whole_batch(chosen, rollouts, method.samples, settings.max_tokens, token_budget)
    silent = MicroBatches(
        token_budget, engines.learner.forget, lambda: False, lambda *_: None, lambda text: console.warn(text)
    )
    started = time.perf_counter()
    for _ in method.gradients(0, prompts, batch, silent):
        engines.learner.forget()
    training = time.perf_counter() - started
    n, trained = settings.answers_per_step, sum(len(r) for r in batch)
    longest = settings.max_tokens + sum(len(r.prompt) for r in rollouts) / len(rollouts)
    answers, gradient = n * settings.max_tokens * answering / answered, n * longest * training / trained
    _line("answering", f"{answered / answering:,.0f} tokens/s")
    _line("training", f"{trained / training:,.0f} tokens/s, prompts included")
    _line("a step", f"{_duration(answers + gradient)} ({n:,} answers of {settings.max_tokens:,} tokens)")
    whole = settings.steps * (answers + gradient) + answers  # the last adapter's answers are looked at too
    _line(counted(settings.steps, "step"), _duration(whole))
    _line("memory", f"{human_size(engines.learner.peak_memory())} at its peak, with one whole micro-batch")


def _whole_batch(
    chosen: Sequence[int], rollouts: Sequence[Rollout], samples: int, length: int, budget: int
) -> tuple[list[int], list[Rollout]]:
    """As many answers as a micro-batch takes, each stretched to `length` tokens by saying it again: whole
    groups, and so one at least."""
    long = [replace(r, answer=(r.answer * length)[:length]) for r in rollouts]
    groups = min(len(chosen), max(1, budget // max(map(len, long)) // samples))
    return list(chosen[:groups]), long[: groups * samples]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
