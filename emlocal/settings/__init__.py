"""The settings of emlocal, each declared once, and the one ranking of their sources.

`table` defines a setting, `resolve` finds where its value comes from. The other modules hold the settings:
`options` those of an answer and of the engine; `em` collects those of the EM steps, which are declared in the
steps' own files (`emlocal.em.steps`).

The names below are loaded when they are first used, because an EM step's file needs `table`, and `em` needs
the steps' files.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emlocal.em import EMStep, describe_em
    from emlocal.em.steps.adaptive_temperature import AdaptiveTemperature
    from emlocal.em.steps.em_inf import EM_PRESETS, EMInf
    from emlocal.settings.em import EM_STEPS
    from emlocal.settings.options import DEFAULT_MAX_TOKENS, MAX_SEED, Plan, SamplingParams
    from emlocal.settings.resolve import Resolved, overridden, resolve_settings
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
_WHERE = {
    "emlocal.em": ("EMStep", "describe_em"),
    "emlocal.em.steps.adaptive_temperature": ("AdaptiveTemperature",),
    "emlocal.em.steps.em_inf": ("EM_PRESETS", "EMInf"),
    "emlocal.settings.em": ("EM_STEPS",),
    "emlocal.settings.resolve": ("Resolved", "overridden", "resolve_settings"),
    "emlocal.settings.options": ("DEFAULT_MAX_TOKENS", "MAX_SEED", "Plan", "SamplingParams"),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'emlocal.settings' has no attribute {name!r}")
    value = vars(import_module(_HOME.get(name, "emlocal.settings.table")))[name]
    globals()[name] = value
    return value
