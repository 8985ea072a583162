"""What a line of the input may set for itself: any sampling or EM value, by the name of its flag or field."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from emlocal.errors import UsageError
from emlocal.sampling.draw import MAX_SEED
from emlocal.settings import EM_PRESETS, AdaptiveTemperature, EMInf, EMStep, SamplingParams, settings_of

_ALIASES = {
    "temp": "temperature",
    "dynatemp_exp": "dynatemp_exponent",
    "max_completion_tokens": "max_tokens",
    "n": "samples",
}
_NUMBERS = frozenset(settings_of(SamplingParams))
_EM_NUMBERS = {f"em_{name}": name for name in settings_of(EMInf)} | {"em_ratio": "ratio"}
_OTHERS = frozenset(
    {"max_tokens", "stop", "seed", "samples", "logit_bias", "em_inf", "em_preset", "em_optimizer"}
    | {"adaptive_temp"}
)
NAMES = frozenset(_NUMBERS | _EM_NUMBERS.keys() | _OTHERS | _ALIASES.keys())
"""Everything that a line may set."""


@dataclass(frozen=True)
class Plan:
    """How one prompt is to be answered."""

    params: SamplingParams
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    samples: int

    def with_overrides(self, values: Mapping[str, Any]) -> "Plan":
        """This plan with a line's own values. Raises UsageError that names the value."""
        given = {_canonical(name): value for name, value in values.items() if value is not None}
        params = replace(self.params, em=_em_step(self.params.em, given))
        for name in _NUMBERS & given.keys():
            params = _checked(params, name, name, given[name])
        if "logit_bias" in given:
            params = replace(params, logit_bias=_bias(given["logit_bias"]))
        return Plan(
            params,
            _whole(given, "max_tokens", self.max_tokens, 1),
            _stop(given["stop"]) if "stop" in given else self.stop,
            _whole(given, "seed", self.seed, 0, MAX_SEED),
            _whole(given, "samples", self.samples, 1, 1024),
        )


def known_name(name: str) -> bool:
    """Whether a line may set something of this name."""
    return name.replace("-", "_") in NAMES


def meant(name: str) -> str | None:
    """The setting that a misspelt name probably means."""
    near = difflib.get_close_matches(name.replace("-", "_"), NAMES, 1, cutoff=0.8)
    return near[0] if near else None


def fields_of(values: Mapping[str, Any]) -> frozenset[str]:
    """The fields that a line's own values set."""
    return frozenset(_canonical(name) for name, value in values.items() if value is not None)


def _canonical(name: str) -> str:
    name = name.replace("-", "_")
    return _ALIASES.get(name, name)


def _checked(settings: Any, field: str, said: str, value: Any) -> Any:
    """`settings` with one number changed; the error speaks of it as the line does, not of a flag."""
    known = settings_of(type(settings))[field]
    if known.whole is False and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    try:
        return replace(settings, **{field: value})
    except UsageError as error:
        raise UsageError(error.message.replace(known.flag, said, 1)) from None


def _em_step(step: EMStep | None, given: Mapping[str, Any]) -> EMStep | None:
    switch, preset = given.get("em_inf"), given.get("em_preset")
    for name in ("em_inf", "adaptive_temp"):
        if not isinstance(given.get(name, False), bool):
            raise UsageError(f"{name} is {given[name]!r}; it must be true or false")
    if given.get("adaptive_temp"):
        step = step if isinstance(step, AdaptiveTemperature) else AdaptiveTemperature()
    elif switch is False or given.get("adaptive_temp") is False:
        step = None
    elif preset is not None:
        if preset not in EM_PRESETS:
            raise UsageError(f"em_preset is {preset!r}; it must be one of {', '.join(EM_PRESETS)}")
        step = EM_PRESETS[preset][0]
    elif switch:
        step = step if isinstance(step, EMInf) else EMInf()
    for said, field in _EM_NUMBERS.items():
        if said not in given:
            continue
        if step is None or field not in settings_of(type(step)):
            raise UsageError(f"{said} does nothing here", "set em_inf (or adaptive_temp, for em_ratio)")
        step = _checked(step, field, said, given[said])
    if "em_optimizer" in given:
        if not isinstance(step, EMInf):
            raise UsageError("em_optimizer does nothing here", "set em_inf")
        step = replace(step, optimizer=given["em_optimizer"])
    return step


def _whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int | None = None) -> int:
    value = given.get(name, default)
    right = isinstance(value, int) and not isinstance(value, bool) and low <= value
    if not right or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UsageError(f"{name} is {value!r}; it must be a whole number {span}")
    return int(value)


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f"stop is {value!r}; it must be a text or a list of texts, none of them empty")
    return tuple(texts)


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    """{"token id": bias}, as OpenAI has it."""
    if isinstance(value, dict) and all(
        t.isdecimal() and isinstance(b, int | float) for t, b in value.items()
    ):
        return tuple((int(token), float(bias)) for token, bias in value.items())
    raise UsageError(f"logit_bias is {value!r}; it must be an object of token ids and numbers")
