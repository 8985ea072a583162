"""The EM steps of emlocal, one file each.

To add one, add a file here and a line in the table (docs/extending.md).
"""

from emlocal.em import EMStep
from emlocal.em.steps.adaptive_temperature import AdaptiveTemperature
from emlocal.em.steps.em_inf import EMInf

__all__ = ["STEPS", "AdaptiveTemperature", "EMInf"]

STEPS: dict[str, type[EMStep]] = {
    step.name: step
    for step in (
        EMInf,
        AdaptiveTemperature,
    )
}
"""The EM steps, by name."""
