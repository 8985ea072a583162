"""The method sample: one answer with the sampling settings, without EM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from emlocal.methods.method import Method


@dataclass(frozen=True)
class Sample(Method):
    """`sample:T` draws from the model's distribution at temperature T, without truncation or penalties."""

    name: ClassVar[str] = "sample"
    value: ClassVar[str] = "temperature"
    with_value: ClassVar[Mapping[str, float]] = {
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "dynatemp_range": 0.0,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
