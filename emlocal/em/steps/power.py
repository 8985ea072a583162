"""The power of a distribution: logits times α, so p^α up to its sum.

What Power-SMC proposes tokens from (emlocal/methods/power.py). It has no flag: alone it is the temperature
1/α, which has one. As a step it says a token's probability on both sides: p before, p^α / Σ p^α after.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from emlocal.em import EMStep, Outcome
from emlocal.settings.table import check_settings, setting

if TYPE_CHECKING:
    from emlocal.em.entropy import Float64


@dataclass(frozen=True)
class Power(EMStep):
    """Settings. Raises UsageError for a value out of range."""

    name: ClassVar[str] = "power"
    flag: ClassVar[str] = ""
    help: ClassVar[str] = ""

    alpha: float = setting(2.0, "--power-alpha", 1, 100, "α of power: answers as p^α has them.")

    def __post_init__(self) -> None:
        check_settings(self)

    def describe(self) -> str:
        return f"p^{self.alpha:g}"

    def reference(self, z: "Float64") -> Outcome:
        from emlocal.em.entropy import entropy

        z = z - z.max()
        sharper = self.alpha * z
        return Outcome(sharper, float(entropy(z)), float(entropy(sharper)), 1)
