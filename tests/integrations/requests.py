"""Requests as vLLM hands them to a processor."""

from dataclasses import dataclass
from typing import Any

from emlocal.em import EMStep
from emlocal.em.steps import AdaptiveTemperature


@dataclass(frozen=True)
class Asked:
    """The fields of vLLM's SamplingParams that the plugin reads, with vLLM's defaults."""

    extra_args: dict[str, Any] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


def asked_of(extra: dict[str, Any]) -> Asked:
    """Returns a request with these extra_args."""
    return Asked(extra)


def extra_of(step: EMStep) -> dict[str, Any]:
    """Returns the extra_args that ask for a step of emlocal's."""
    switch = "adaptive_temp" if isinstance(step, AdaptiveTemperature) else "em_inf"
    return {switch: 1, **{f"em_{name}": value for name, value in vars(step).items()}}
