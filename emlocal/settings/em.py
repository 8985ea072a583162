"""The table of the EM steps' switches and settings, made from the steps' own records."""

from collections.abc import Sequence
from dataclasses import replace

from emlocal.em import EMStep
from emlocal.em.steps import STEPS
from emlocal.em.steps.em_inf import EM_PRESETS
from emlocal.settings.table import Setting, Table, records_of

PANEL = "Entropy minimization"


EM_STEPS = tuple(STEPS.values())
"""All EM steps. Their flags, keys and fields come from this table."""


def named(known: Setting) -> Setting:
    """Returns a step's setting under its name in the common table: em_threshold, not threshold."""
    return replace(known, name=known.flag.removeprefix("--").replace("-", "_"), panel=known.panel or PANEL)


def switch_of(step: type[EMStep]) -> Setting:
    """Returns the setting that switches a step on and off."""
    off = f"--no-{step.flag.removeprefix('--')}"
    switch = Setting(step.flag, help=step.help, kind="switch", default=False, off=off)
    return named(switch)


def em_numbers(step: type[EMStep]) -> dict[str, Setting]:
    """Returns the settings of a step, by their names in the common table."""
    return {known.name: known for known in map(named, records_of(step).values())}


PRESET = Setting(
    "--em-preset",
    help="Choose EM-INF settings: the paper's eq. 5 (paper) or its code (em-pt). Implies --em-inf.",
    name="em_preset",
    kind="choice",
    choices=tuple(EM_PRESETS),
    panel=PANEL,
)


def em_table(steps: Sequence[type[EMStep]]) -> Table:
    """Returns the table of each step's switch, the preset, and the steps' settings.

    Steps may share a setting, under one flag.
    """
    settings = {switch.name: switch for switch in map(switch_of, steps)} | {PRESET.name: PRESET}
    others: dict[str, list[str]] = {}
    for step in steps:
        for name, known in em_numbers(step).items():
            first = settings.setdefault(name, known)
            if first.default != known.default:
                others.setdefault(name, []).append(f"{known.default:g} with {step.flag}")
    for name, defaults in others.items():
        first = settings[name]
        said = "; ".join([f"{first.default:g}", *defaults])
        settings[name] = replace(first, help=f"{first.help} (default: {said})")
    return Table(settings)


EM = em_table(EM_STEPS)
