"""The power of a distribution: logits times α, which is p^α up to its sum.

Power-SMC proposes tokens from it (emlocal/methods/power.py). It has no flag: by itself it is the temperature
1/α, which has one. As a step it gives a token's probability on both sides: p before, p^α / Σ p^α after.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from emlocal.em import EMStep, Outcome
from emlocal.settings.table import check_settings, setting

if TYPE_CHECKING:
    from emlocal.em.entropy import Float64


@dataclass(frozen=True)
class Power(EMStep):
    """The power step and its settings. Raises UsageError for a value out of range."""

    name: ClassVar[str] = "power"
    flag: ClassVar[str] = ""
    help: ClassVar[str] = ""

    alpha: float = setting(
        2.0, "--power-alpha", 1, 100, "Set the exponent α of --method power: it samples from p^α."
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def keeps_most_probable(self) -> bool:
        """Always: one factor for all logits keeps their order."""
        return True

    def describe(self) -> str:
        return f"p^{self.alpha:g}"

    def reference(self, z: "Float64") -> Outcome:
        from emlocal.em.entropy import entropy

        z = z - z.max()
        sharper = self.alpha * z
        return Outcome(sharper, float(entropy(z)), float(entropy(sharper)), 1)
