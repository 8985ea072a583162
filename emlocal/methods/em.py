"""One answer with an EM step: each step of `EM_STEPS` is a method with the step's name."""

from dataclasses import dataclass
from typing import ClassVar

from emlocal.methods.method import Method
from emlocal.settings import EM_STEPS, EMInf, EMStep
from emlocal.settings.em import PRESET, em_numbers


def method_of(em: type[EMStep]) -> type[Method]:
    """Returns the method that samples with a step.

    NAME:VALUE sets EM-INF's preset, or another step's first setting.
    """

    @dataclass(frozen=True)
    class WithStep(Method):
        name: ClassVar[str] = em.name
        step: ClassVar[type[EMStep] | None] = em
        value: ClassVar[str] = PRESET.name if em is EMInf else next(iter(em_numbers(em)))

    return WithStep


EM_METHODS = tuple(map(method_of, EM_STEPS))
