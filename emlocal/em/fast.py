"""The EM step on a split row: what decoding calls."""

from emlocal.em.adam_descent import adam_descent
from emlocal.em.cooling import cool
from emlocal.em.gradient_descent import gradient_descent
from emlocal.em.split import Sharpened, Split
from emlocal.settings import AdaptiveTemperature, EMStep

DOUBT = 1e-5
"""More than the float32 sweep can put the entropy off by."""


def sharpen(split: Split, step: EMStep | None) -> Sharpened | None:
    """The row after `step`; None where agreement with the reference cannot be promised at this cutoff."""
    if step is None:
        return split.untouched()
    if isinstance(step, AdaptiveTemperature):
        return cool(split, step)
    one_hot = len(split.head) == 1 and split.tail_mass == 0
    if one_hot or step.steps == 0 or step.threshold > split.entropy + DOUBT:
        return split.untouched()
    return adam_descent(split, step) if step.optimizer == "adam" else gradient_descent(split, step)
