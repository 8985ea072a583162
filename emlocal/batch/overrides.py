"""What a line of the input may set for itself: any sampling or EM value, by the name of its flag or field."""

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from emlocal.errors import UsageError
from emlocal.settings import (
    EM_PRESETS,
    MAX_SEED,
    AdaptiveTemperature,
    EMInf,
    EMStep,
    SamplingParams,
    settings_of,
)

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
_LARGEST_BIAS = 1e30  # logits are float32: what is infinite there makes a row no distribution
_LONGEST_TOKEN_ID = 18  # digits
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
        given = _given(values)
        params = replace(self.params, em=_em_step(self.params.em, given))
        if "em_preset" in given:  # as the flag does, it brings its sampling settings along
            params = replace(params, **EM_PRESETS[given["em_preset"]][1])
        for name in sorted(_NUMBERS & given.keys()):
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


def shown(value: Any) -> str:
    """A value of a line in an error message: as JSON, and not longer than a line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _canonical(name: str) -> str:
    name = name.replace("-", "_")
    return _ALIASES.get(name, name)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is set, by canonical names. Raises UsageError where one thing is set under two names."""
    names: dict[str, str] = {}
    for name, value in values.items():
        if value is not None and names.setdefault(_canonical(name), name) != name:
            raise UsageError(f"{names[_canonical(name)]} and {name} are the same setting", "give one of them")
    return {canonical: values[name] for canonical, name in names.items()}


def _checked(settings: Any, field: str, said: str, value: Any) -> Any:
    """`settings` with one number changed; the error speaks of it as the line does, not of a flag."""
    known = settings_of(type(settings))[field]
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > sys.float_info.max:
        number = "whole number" if known.whole else "number"
        raise UsageError(f"{said} is {shown(value)}; it must be a {number} {known.span()}")
    try:
        return replace(settings, **{field: value if known.whole else float(value)})
    except UsageError as error:
        raise UsageError(error.message.replace(known.flag, said, 1)) from None


def _em_step(step: EMStep | None, given: Mapping[str, Any]) -> EMStep | None:
    step = _em_kind(step, given)
    for said, field in _EM_NUMBERS.items():
        if said not in given:
            continue
        if step is None or field not in settings_of(type(step)):
            raise UsageError(f"{said} does nothing here", "set em_inf (or adaptive_temp, for em_ratio)")
        step = _checked(step, field, said, given[said])
    if "em_optimizer" in given:
        if not isinstance(step, EMInf):
            raise UsageError("em_optimizer does nothing here", "set em_inf")
        if given["em_optimizer"] not in ("sgd", "adam"):
            raise UsageError(f"em_optimizer is {shown(given['em_optimizer'])}; it must be sgd or adam")
        step = replace(step, optimizer=given["em_optimizer"])
    return step


def _em_kind(step: EMStep | None, given: Mapping[str, Any]) -> EMStep | None:
    """The kind of step that the line asks for; `step` where it does not."""
    em_inf, adaptive, preset = given.get("em_inf"), given.get("adaptive_temp"), given.get("em_preset")
    for name, switch in (("em_inf", em_inf), ("adaptive_temp", adaptive)):
        if not isinstance(switch, bool | None):
            raise UsageError(f"{name} is {shown(switch)}; it must be true or false")
    if preset is not None and preset not in tuple(EM_PRESETS):
        raise UsageError(f"em_preset is {shown(preset)}; it must be one of {', '.join(EM_PRESETS)}")
    if adaptive and (em_inf or preset):
        raise UsageError("adaptive_temp and em_inf contradict each other: there is one EM step")
    if em_inf is False and preset:
        raise UsageError("em_inf is false, and em_preset asks for it", "leave one of them out")
    if adaptive:
        return step if isinstance(step, AdaptiveTemperature) else AdaptiveTemperature()
    if preset is not None:
        return EM_PRESETS[preset][0]
    if em_inf:
        return step if isinstance(step, EMInf) else EMInf()
    off = em_inf is False or (adaptive is False and isinstance(step, AdaptiveTemperature))
    return None if off else step


def _whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int | None = None) -> int:
    value = given.get(name, default)
    right = isinstance(value, int) and not isinstance(value, bool) and low <= value
    if not right or (high is not None and value > high):
        span = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UsageError(f"{name} is {shown(value)}; it must be a whole number {span}")
    return int(value)


def _stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f"stop is {shown(value)}; it must be a text or a list of texts, none of them empty")
    return tuple(texts)


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    """{"token id": bias}, as OpenAI has it."""
    if not isinstance(value, dict):
        raise UsageError(f"logit_bias is {shown(value)}; it must be an object of token ids and numbers")
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) <= _LONGEST_TOKEN_ID):
            raise UsageError(f"logit_bias names {shown(token)}; it must be a token id, 0 or more")
        if not isinstance(bias, int | float) or isinstance(bias, bool) or not abs(bias) <= _LARGEST_BIAS:
            span = f"a number between {-_LARGEST_BIAS:g} and {_LARGEST_BIAS:g}"
            raise UsageError(f"logit_bias of token {token} is {shown(bias)}; it must be {span}")
    return tuple((int(token), float(bias)) for token, bias in value.items())
