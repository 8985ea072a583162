"""llama.cpp's dynamic temperature: higher where the model is unsure. It serves for comparison with EM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from emlocal.methods.method import Method


@dataclass(frozen=True)
class DynamicTemperature(Method):
    """`dynamic-temperature:R` lets the temperature vary by ± R."""

    name: ClassVar[str] = "dynamic-temperature"
    value: ClassVar[str] = "dynatemp_range"
    sampling: ClassVar[Mapping[str, float]] = {"dynatemp_range": 0.5}
