"""The one resolver: from flags, files and lines to the settings of an answer, with their sources.

A setting's value comes from the strongest source that gives it:

    a line's own field, or a keyword in Python
    a flag; a setting made in a chat with /set is as strong
    the preset that one of these names
    the config file
    the model's own settings
    emlocal's default

A preset that the config file names sets the EM step alone.

The module also reads settings from TOML files: the config file, and those of training runs.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emlocal.em import EMStep
from emlocal.em.steps.em_inf import EM_PRESETS, EMInf
from emlocal.errors import UsageError
from emlocal.files import config_dir
from emlocal.settings.confidence import CONFIDENCE
from emlocal.settings.constraint import NAMES as CONSTRAINT_NAMES
from emlocal.settings.constraint import ConstraintSettings
from emlocal.settings.em import EM, EM_STEPS, PRESET, em_numbers, named, switch_of
from emlocal.settings.options import ENGINE, Plan, SamplingParams
from emlocal.settings.table import FLAGS, KEYS, NAMES, NOTHING, Given, Table, Words, ranked, records_of

_PARAMS = Table.of(SamplingParams)
CONSTRAINT = Table.of(ConstraintSettings)
"""Settings of the form that an answer must have."""
SAMPLING = (_PARAMS | Table.of(Plan).without("samples", *CONSTRAINT_NAMES)).beginning_with(
    *("temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p", "min_p"),
    *("repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty", "logit_bias", "seed"),
)
"""Settings of how tokens are chosen and when an answer ends."""
GENERATION = SAMPLING | EM | CONSTRAINT
"""Settings of an answer that flags, the config file, /set and Python's keywords can give."""
LINE = GENERATION | Table.of(Plan)
"""Settings that a line of a batch can give, and eval's specs."""
_LIMITS = records_of(Plan)
_SWITCHES = {step: switch_of(step) for step in EM_STEPS}
_SWITCH_NAMES = [PRESET.name, *(switch.name for switch in _SWITCHES.values())]
_NUMBERS = {step: em_numbers(step) for step in EM_STEPS}
_PRESET_NUMBERS = {
    name: {named(known).name: vars(step)[field] for field, known in records_of(type(step)).items()}
    for name, (step, _) in EM_PRESETS.items()
}


@dataclass(frozen=True)
class Resolved:
    """The settings of an answer, and the source of each."""

    plan: Plan
    sources: Mapping[str, str]
    """Name of the setting → "line", "keyword", "flag", "preset", "config", "model" or "default"."""

    @property
    def params(self) -> SamplingParams:
        """The settings of how tokens are chosen."""
        return self.plan.params

    @property
    def chosen(self) -> frozenset[str]:
        """The names of the settings that somebody chose; a method does not change them.

        EM settings of the config file are not among them: a method is stronger than those.
        """
        return frozenset(
            name
            for name, source in self.sources.items()
            if source not in ("default", "model", "preset")
            and not (source == "config" and name in EM.settings)
        )

    def with_model(self, own: Mapping[str, float]) -> "Resolved":
        """Returns these settings with the model's own in place of emlocal's defaults.

        Args:
            own: the settings in the model's file, under its names; those that emlocal does not have are
                ignored.
        Raises:
            UsageError: a value is out of range.
        """
        found = {}
        for name, value in own.items():
            known = _PARAMS.find(name)
            if (
                known is None
                or known.kind not in ("number", "whole")
                or self.sources[known.name] != "default"
            ):
                continue
            if known.whole and math.isfinite(value):  # some files write whole numbers as floats
                # and a negative top-k is off in llama.cpp
                value = max(0, int(value)) if known.name == "top_k" else int(value)
            try:
                found[known.name] = known.value(value, known.flag)
            except UsageError as error:
                message = f"the model's own settings: {error.message}"
                raise UsageError(message, f"set {known.flag} yourself") from None
        params = replace(self.params, **found)
        return Resolved(replace(self.plan, params=params), {**self.sources, **dict.fromkeys(found, "model")})


def resolve_settings(*layers: tuple[str, Given], base: Plan = Plan(), words: Words = FLAGS) -> Resolved:
    """Returns the settings of an answer.

    Args:
        layers: (source, what it gives), the strongest first; values as from `Table.read`.
        base: the values of settings that no layer gives.
        words: how settings are spelt in the first layer, for error messages.
    Raises:
        UsageError: the first layer contradicts itself, or has a setting without effect.
    """
    kept, base = _with_one_constraint(layers, base)
    values, sources = ranked(_with_presets(kept), [*_PARAMS.settings, *_LIMITS, *_SWITCH_NAMES])
    step, of_step = _em_step(layers, base.params.em, words)
    own = {name: value for name, value in values.items() if name in _PARAMS.settings}
    limits = {name: value for name, value in values.items() if name in _LIMITS}
    plan = replace(base, params=replace(base.params, em=step, **own), **limits)
    return Resolved(plan, {**dict.fromkeys((*_PARAMS.settings, *_LIMITS), "default"), **sources, **of_step})


def random_seed() -> int:
    """Returns a random seed of 32 bits, short enough to type again."""
    return int.from_bytes(os.urandom(4))


def overridden(plan: Plan, line: Mapping[str, Any]) -> Plan:
    """Returns `plan` with a line's own values. Raises UsageError that names the value."""
    given = LINE.read(line, NAMES)
    return resolve_settings(("line", given), base=plan, words=NAMES).plan if given else plan


def names_in(line: Mapping[str, Any]) -> frozenset[str]:
    """Returns the names of the settings that a line gives."""
    found = (LINE.find(name) for name, value in line.items() if value is not None)
    return frozenset(known.name for known in found if known is not None)


def _with_presets(layers: Sequence[tuple[str, Given]]) -> Iterator[tuple[str, Given]]:
    """Yields the layers, each followed by the sampling settings of the preset that it names."""
    for source, given in layers:
        yield source, given
        if source != "config" and PRESET.name in given:
            yield "preset", EM_PRESETS[given[PRESET.name]][1]


def _with_one_constraint(
    layers: Sequence[tuple[str, Given]], base: Plan
) -> tuple[Sequence[tuple[str, Given]], Plan]:
    """Returns layers and base with the strongest constraint only, because an answer has one form."""
    found = False
    kept: list[tuple[str, Given]] = []
    for source, given in layers:
        own = given.keys() & set(CONSTRAINT_NAMES)
        if found and own:
            given = {name: value for name, value in given.items() if name not in own}
        found = found or bool(own)
        kept.append((source, given))
    return kept, replace(base, json_schema=None, regex=None, grammar=None) if found else base


def check_switches(given: Given, words: Words) -> None:
    """Raises UsageError if one source asks for two EM steps, or for one that it switches off."""
    em_inf, on = _SWITCHES[EMInf], _steps_in(given)
    if given.get(em_inf.name) is False and PRESET.name in given:
        raise UsageError(
            f"{words.off(em_inf)} and {words.said(PRESET)} contradict each other", "leave one of them out"
        )
    if len(on) > 1:
        one, other = (words.said(_SWITCHES[step]) for step in on[:2])
        raise UsageError(f"{one} and {other} contradict each other: only one EM step can run")


def _steps_in(given: Given) -> list[type[EMStep]]:
    """Returns the steps that one source switches on."""
    return [
        step
        for step, switch in _SWITCHES.items()
        if given.get(switch.name) or (step is EMInf and PRESET.name in given)
    ]


def _em_step(
    layers: Sequence[tuple[str, Given]], base: EMStep | None, words: Words
) -> tuple[EMStep | None, dict[str, str]]:
    """Returns the EM step and the sources of its settings.

    The strongest layer that mentions a step decides; `base` if no layer does.
    """
    source, first = layers[0] if layers else ("", NOTHING)
    check_switches(first, words)
    kind = _kind(layers, base)
    for name in EM.settings:
        owners = [step for step in EM_STEPS if name in _NUMBERS[step]]
        if source != "config" and name in first and owners and kind not in owners:
            switches = [_SWITCHES[step] for step in owners]
            needed = " or ".join(map(words.said, switches))
            raise UsageError(
                f"{words.said(EM.settings[name])} has no effect without {needed}", words.on(switches[0])
            )
    if kind is None:
        return None, {}
    numbers = _NUMBERS.get(kind, {})  # Python may pass a step of its own, which has no flags
    values, sources = ranked(_with_preset_numbers(layers, kind), numbers)
    step = base if isinstance(base, kind) else kind()
    step = replace(step, **{numbers[name].field: value for name, value in values.items()})
    return step, {**dict.fromkeys(numbers, "default"), **sources}


def _kind(layers: Sequence[tuple[str, Given]], base: EMStep | None) -> type[EMStep] | None:
    """Returns the type of the step that is on; None if EM is off."""
    off: set[type[EMStep]] = set()
    for _, given in layers:
        on = [step for step in _steps_in(given) if step not in off]
        if on:
            return on[0]
        off |= {step for step, switch in _SWITCHES.items() if given.get(switch.name) is False}
        if EMInf in off:  # "no EM-INF" is "no EM"
            return None
    return None if base is None or type(base) in off else type(base)


def _with_preset_numbers(
    layers: Sequence[tuple[str, Given]], kind: type[EMStep]
) -> Iterator[tuple[str, Given]]:
    for source, given in layers:
        yield source, given
        if kind is EMInf and PRESET.name in given:
            yield "preset", _PRESET_NUMBERS[given[PRESET.name]]


def config_path() -> Path:
    """Returns the path of the config file, whether it exists or not."""
    return config_dir() / "config.toml"


def read_config() -> dict[str, Any]:
    """Returns the config file's settings: of model and engine, sampling, EM and confidence.

    They are empty if there is no such file. Raises UsageError that names file and key.
    """
    path = config_path()
    if not path.exists():
        return {}
    config = read_settings(path, ENGINE | GENERATION | CONFIDENCE)
    try:
        check_switches(config, KEYS)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", error.hint) from None
    return config


def read_settings(path: Path, table: Table) -> dict[str, Any]:
    """Returns the settings in a TOML file. Their names are those of the flags, without dashes.

    Raises UsageError that names file and key: the file is missing or cannot be read, or a setting in it is
    unknown, of the wrong kind or out of range.
    """
    import tomllib  # most people have no such file

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}", "name a TOML file: --config run.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as why:
        raise UsageError(f"{path} cannot be read: {why}") from why
    try:
        return table.read(values, KEYS)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", error.hint) from None
