"""The method greedy: takes the most probable token at each step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from emlocal.methods.method import Method


@dataclass(frozen=True)
class Greedy(Method):
    """Sampling at temperature 0."""

    name: ClassVar[str] = "greedy"
    sampling: ClassVar[Mapping[str, float]] = {"temperature": 0.0}
    fixed: ClassVar[frozenset[str]] = frozenset({"temperature"})
