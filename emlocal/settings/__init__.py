"""Everything that people set, each thing declared once, and the one ranking of where values come from.

`table` says what a setting is, `resolve` where its value comes from. The others hold the settings: `em` those
of the EM steps, `sampling` those of an answer, `engine` those of the engine, `files` reads config.toml.
"""

from emlocal.settings.em import EM_PRESETS, EM_STEPS, AdaptiveTemperature, EMInf, EMStep, describe_em
from emlocal.settings.resolve import Resolved, overridden, resolve_settings
from emlocal.settings.sampling import DEFAULT_MAX_TOKENS, MAX_SEED, Plan, SamplingParams
from emlocal.settings.table import Given, Setting, Table, check_settings, records_of, setting, settings_of

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "EM_PRESETS",
    "EM_STEPS",
    "MAX_SEED",
    "AdaptiveTemperature",
    "EMInf",
    "EMStep",
    "Given",
    "Plan",
    "Resolved",
    "SamplingParams",
    "Setting",
    "Table",
    "check_settings",
    "describe_em",
    "overridden",
    "records_of",
    "resolve_settings",
    "setting",
    "settings_of",
]
