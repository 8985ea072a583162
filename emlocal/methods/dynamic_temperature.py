"""llama.cpp's dynamic temperature: hotter where the model is unsure. A rival of EM, for comparison."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from emlocal.methods.method import Method


@dataclass(frozen=True)
class DynamicTemperature(Method):
    """`dynamic-temperature:R` has the temperature ± R."""

    name: ClassVar[str] = "dynamic-temperature"
    value: ClassVar[str] = "dynatemp_range"
    sampling: ClassVar[Mapping[str, float]] = {"dynatemp_range": 0.5}
