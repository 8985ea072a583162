"""Min-p sampling, as in its paper (arXiv 2407.01082)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from emlocal.methods.method import Method


@dataclass(frozen=True)
class MinP(Method):
    """`min-p:P` drops tokens with less than the share P of the most probable token's probability."""

    name: ClassVar[str] = "min-p"
    value: ClassVar[str] = "min_p"
    sampling: ClassVar[Mapping[str, float]] = {"min_p": 0.1, "temperature": 1.0}
