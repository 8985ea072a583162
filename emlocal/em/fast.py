"""The EM step on a split row: what decoding calls."""

from emlocal.em.adam_descent import adam_descent
from emlocal.em.cooling import cool
from emlocal.em.gradient_descent import gradient_descent
from emlocal.em.split import Sharpened, Split
from emlocal.settings import AdaptiveTemperature, EMStep


def sharpen(split: Split, step: EMStep | None) -> Sharpened | None:
    """The row after `step`; None where agreement with the reference cannot be promised at this cutoff."""
    if step is None:
        return split.untouched()
    if isinstance(step, AdaptiveTemperature):
        return cool(split, step)
    if step.steps == 0 or step.threshold > split.entropy + 1e-6:
        return split.untouched()
    return adam_descent(split, step) if step.optimizer == "adam" else gradient_descent(split, step)
