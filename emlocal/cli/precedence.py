"""From flags, the config file and the model to the settings that a run uses.

Precedence: flag > preset named by flag > config file > model > emlocal's default.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from emlocal.cli.options import EMOptions, EngineOptions, SamplingOptions
from emlocal.errors import UsageError
from emlocal.models.paths import config_dir
from emlocal.settings import (
    DEFAULT_MAX_TOKENS,
    EM_PRESETS,
    MAX_SEED,
    AdaptiveTemperature,
    EMInf,
    EMStep,
    SamplingParams,
    settings_of,
)

Group = TypeVar("Group", EngineOptions, SamplingOptions, EMOptions)
_LONG_NAMES = {"temperature": "temp", "dynatemp-exponent": "dynatemp-exp"}  # what people write → the flag
_EM_INF_ONLY = ("em_steps", "em_learning_rate", "em_optimizer", "em_kl_weight")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_MODEL_NAMES = {"penalty_repeat": "repeat_penalty", "penalty_last_n": "repeat_last_n"}  # GGUF's → ours


@dataclass(frozen=True)
class Config:
    """The config file: the same groups of flags, where it sets them."""

    engine: EngineOptions = field(default_factory=EngineOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    em: EMOptions = field(default_factory=EMOptions)


def config_path() -> Path:
    """Where the config file is, or would be."""
    return config_dir() / "config.toml"


def read_config() -> Config:
    """The config file; an empty one where there is none. Raises UsageError, naming file and key."""
    path = config_path()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Config()
    except (UnicodeDecodeError, OSError) as why:
        raise UsageError(f"{path} cannot be read: {why}") from why
    import tomllib  # most people have no such file

    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as why:
        raise UsageError(f"{path} cannot be read: {why}") from why
    groups: dict[type, dict[str, Any]] = {EngineOptions: {}, SamplingOptions: {}, EMOptions: {}}
    known = {flag: (group, name) for group in groups for flag, name in flag_names(group).items()}
    for key, value in values.items():
        if key not in known:
            raise unknown_setting(key, list(known), f"{path}: ")
        group, name = known[key]
        groups[group][name] = typed(group, name, value, f"{path}: {key}")
    return Config(*(group(**found) for group, found in groups.items()))


def flag_names(group: type) -> dict[str, str]:
    """A group's flags without their dashes ("top-k"), and the fields that they set."""
    hints = get_type_hints(group, include_extras=True)
    names = {}
    for f in fields(group):
        (option,) = hints[f.name].__metadata__
        names_of_option = (option.default, *option.param_decls)  # typer takes the first name for a default
        flag = next(d for d in names_of_option if d.startswith("--"))
        names[flag.split("/")[0].removeprefix("--")] = f.name
    return names


def unknown_setting(name: str, known: list[str], where: str = "") -> UsageError:
    """The error for a setting that does not exist, with those that it may be meant to be."""
    close = difflib.get_close_matches(name, [*known, *_LONG_NAMES], 3, cutoff=0.57)
    near = list(dict.fromkeys(_LONG_NAMES.get(one, one) for one in close))
    hint = f"did you mean {' or '.join(near)}?" if near else f"the names are {', '.join(known)}"
    return UsageError(f"{where}there is no setting {name!r}", hint)


def with_text(group: Group, name: str, text: str) -> Group | None:
    """The group with one setting, named like its flag, read from text; None if it has no such setting.

    Raises UsageError where the text is no such value.
    """
    field_name = flag_names(type(group)).get(name)
    if field_name is None:
        return None
    import tomllib

    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return replace(group, **{field_name: typed(type(group), field_name, value, name)})


def typed(group: type, name: str, value: Any, where: str) -> Any:
    """A TOML value as the field's type."""
    kinds = [k for k in get_type_hints(group)[name].__args__ if k is not type(None)]
    kind = kinds[0]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if getattr(kind, "__origin__", None) is list:
        return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    if isinstance(value, bool) == (kind is bool):
        if isinstance(value, kind):
            return value
        if issubclass(kind, StrEnum) and value in list(kind):
            return kind(value)
    raise UsageError(f"{where} is {value!r}; it must be {_described(kind)}")


def _described(kind: type) -> str:
    """What a value of this type is, for people."""
    return f"one of {', '.join(kind)}" if issubclass(kind, StrEnum) else _KINDS[kind]


def merged(flags: Group, config: Group) -> Group:
    """The flags, with the config file's values where none was given."""
    given = {f.name: getattr(flags, f.name) for f in fields(flags)}
    return replace(config, **{name: value for name, value in given.items() if value is not None})


def em_step(flags: EMOptions, config: EMOptions = EMOptions()) -> EMStep | None:
    """The EM step that these flags ask for. Raises UsageError where they contradict each other."""
    _check_em_flags(flags)
    chosen = flags if _chooses(flags) else config
    values = merged(flags, config)
    if chosen.adaptive_temperature:
        return AdaptiveTemperature(**_given(ratio=values.em_ratio, threshold=values.em_threshold))
    if not (chosen.em_inf or (chosen.em_preset and chosen.em_inf is None)):
        for f in fields(flags):
            if f.name not in ("em_inf", "em_preset") and getattr(flags, f.name) not in (None, False):
                raise UsageError(
                    f"--{f.name.replace('_', '-')} does nothing without --em-inf", "add --em-inf"
                )
        return None
    step, _ = EM_PRESETS[values.em_preset or "default"]
    assert isinstance(step, EMInf)
    return replace(
        step,
        **_given(
            threshold=values.em_threshold,
            steps=values.em_steps,
            learning_rate=values.em_learning_rate,
            optimizer=values.em_optimizer and str(values.em_optimizer),
            kl_weight=values.em_kl_weight,
        ),
    )


def _chooses(em: EMOptions) -> bool:
    return any(value is not None for value in (em.em_inf, em.em_preset, em.adaptive_temperature))


def _check_em_flags(flags: EMOptions) -> None:
    if flags.em_inf is False and flags.em_preset:
        raise UsageError("--no-em-inf and --em-preset contradict each other", "leave one of them out")
    if flags.adaptive_temperature:
        if flags.em_inf or flags.em_preset:
            raise UsageError("--em-inf and --adaptive-temp contradict each other: there is one EM step")
        for name in _EM_INF_ONLY:
            if getattr(flags, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} belongs to --em-inf, not --adaptive-temp")
    elif flags.em_ratio is not None:
        raise UsageError("--em-ratio belongs to --adaptive-temp", "add --adaptive-temp")


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Sampling:
    """Sampling settings and where each comes from."""

    params: SamplingParams
    sources: Mapping[str, str]
    """SamplingParams field → "flag", "preset", "config", "model" or "default"."""


def sampling(flags: SamplingOptions, em: EMOptions, config: Config, model: Mapping[str, float]) -> Sampling:
    """The sampling settings of a run. `model`: the authors' own, from the model's file."""
    preset = EM_PRESETS[em.em_preset][1] if em.em_preset and em.em_inf is not False else {}
    own = {_MODEL_NAMES.get(name, name): value for name, value in model.items()}
    layers = [
        ("flag", vars(flags)),
        ("preset", preset),
        ("config", vars(config.sampling)),
        ("model", own),
    ]
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for f in fields(SamplingParams):
        if f.name in ("em", "logit_bias"):
            continue
        for source, layer in layers:
            if layer.get(f.name) is not None:
                values[f.name], sources[f.name] = layer[f.name], source
                break
        else:
            sources[f.name] = "default"
    for name in ("top_k", "repeat_last_n"):
        if sources[name] == "model":
            values[name] = int(values[name])  # some files write whole numbers as floats
    if sources["top_k"] == "model":
        values["top_k"] = max(0, values["top_k"])  # negative is off in llama.cpp
    bias = merged(flags, config.sampling).logit_bias or []
    try:
        params = SamplingParams(**values, logit_bias=tuple(map(_bias, bias)), em=em_step(em, config.em))
    except UsageError as error:
        raise _where_from(error, sources) from None
    return Sampling(params, sources)


def _where_from(error: UsageError, sources: Mapping[str, str]) -> UsageError:
    """The error, with where the value comes from if nobody typed it."""
    for name, known in settings_of(SamplingParams).items():
        if error.message.startswith(f"{known.flag} "):
            if sources.get(name) == "config":
                return UsageError(f"{config_path()}: {error.message.removeprefix('--')}")
            if sources.get(name) == "model":
                return UsageError(f"the model's own settings: {error.message}", f"give {known.flag} yourself")
    return error


def _bias(text: str) -> tuple[int, float]:
    """ID=BIAS, or llama.cpp's ID+BIAS and ID-BIAS."""
    for separator in "=+-":
        token, found, bias = text.partition(separator)
        if found and token.isdigit():
            try:
                return int(token), float(bias if separator == "=" else separator + bias)
            except ValueError:
                break
    raise UsageError(
        f"--logit-bias is {text!r}; it must be a token id and a number: 15043=-1.5 or 15043=-inf"
    )


def limits(flags: SamplingOptions, config: SamplingOptions) -> tuple[int, tuple[str, ...]]:
    """The most tokens of an answer, and its stop strings."""
    values = merged(flags, config)
    most = DEFAULT_MAX_TOKENS if values.max_tokens is None else values.max_tokens
    if most < 1:
        raise UsageError(f"--max-tokens is {most}; it must be at least 1")
    if "" in (values.stop or []):
        raise UsageError("--stop is empty; it must be some text")
    return most, tuple(values.stop or ())


def seed(flags: SamplingOptions, config: SamplingOptions) -> int:
    """The seed of a run: given, or a random one of 32 bits, short enough to type again."""
    given = merged(flags, config).seed
    if given is None:
        return int.from_bytes(os.urandom(4))
    if not 0 <= given <= MAX_SEED:
        raise UsageError(f"--seed is {given}; it must be between 0 and 2^64 - 1")
    return given
