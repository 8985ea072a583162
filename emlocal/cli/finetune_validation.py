"""Accuracy on prompts with known answers: for information only, nothing is decided by it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from emlocal.methods.answers import equivalent, extract
from emlocal.training.prompts import Prompt
from emlocal.training.rollouts import draw_rollouts
from emlocal.training.settings import FineTuneSettings

if TYPE_CHECKING:
    from emlocal.cli.finetune_engines import Engines

_STEP = 2**31  # of no training step: the draws are the validation's own


def accuracy(
    engines: "Engines",
    prompts: Sequence[Prompt],
    system: str | None,
    settings: FineTuneSettings,
    cancelled: Callable[[], bool],
) -> float:
    """The share of prompts answered rightly, one answer each at the rollouts' temperature.

    The answer is what the last \\boxed holds, else the last number; before and after share their draws.
    """
    tokens = engines.tokens_of(prompts, system, settings.max_tokens)
    answerer = engines.answerer
    rollouts = draw_rollouts(
        answerer.backend, tokens, settings, _STEP, answerer.parallel, cancelled=cancelled
    )
    right = [_is_right(prompt, r.text) for prompt, r in zip(prompts, rollouts, strict=True)]
    return sum(right) / len(right)


def _is_right(prompt: Prompt, text: str) -> bool:
    found = extract(text, "boxed") or extract(text, "last-number")
    wanted = extract(prompt.answer or "", "last-number") or prompt.answer or ""
    return found is not None and equivalent(found, wanted)
