"""Adaptive temperature: cool each row until its entropy is low enough (paper §4, the baseline of EM-INF).

It finds the largest τ ≤ 1 with H(softmax(z/τ)) ≤ max(α·H₀, δ). Among all q with H(q) ≤ c, the one nearest to
p in KL(q ‖ p) is a tempered p. So this is the exact entropy projection of p. EM-INF is a gradient path to the
same goal in another geometry. H grows with τ (dH/d log τ = Var_q(z)/τ² ≥ 0), so bisection finds τ.

The tolerance is on log τ: the authors' 0.1 nats of entropy is more than a confident token's whole entropy.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from emlocal.em import EMStep, Outcome
from emlocal.settings.table import check_settings, setting

if TYPE_CHECKING:
    from emlocal.em.entropy import Float64

TOLERANCE = 1e-7
"""Relative tolerance: the τ returned is within this factor of the largest τ that qualifies."""
COLDEST = 1e-6
"""The lowest τ. Ties for the top stay ties at any τ > 0, so for some rows no τ qualifies."""


@dataclass(frozen=True)
class AdaptiveTemperature(EMStep):
    """Adaptive temperature and its settings. The paper found ratios between 0.4 and 0.6 best."""

    name: ClassVar[str] = "adaptive-temperature"
    flag: ClassVar[str] = "--adaptive-temp"
    help: ClassVar[str] = "Lower the temperature of each token to a target entropy."

    ratio: float = setting(
        0.5, "--em-ratio", 0, 1, "Keep this share of each token's entropy with --adaptive-temp (α)."
    )
    threshold: float = setting(
        0.1, "--em-threshold", 0, math.inf, "Cool no further than to this entropy in nats (δ).", unit="nats"
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def keeps_most_probable(self) -> bool:
        """Always: one temperature for all tokens keeps their order."""
        return True

    def describe(self) -> str:
        return f"adaptive temperature, α {self.ratio:g}, δ {self.threshold:g}"

    def reference(self, z: "Float64") -> Outcome:
        """Takes the step on one row.

        If no τ ≥ COLDEST reaches the target (ties for the top), τ = COLDEST: uniform over the ties.
        """
        from emlocal.em.entropy import entropy

        z = z - z.max()
        before = float(entropy(z))
        target = max(self.ratio * before, self.threshold)
        tau = _largest_temperature(z, target) if before > target else 1.0
        # a masked token needs exp(−inf) only, and −inf/τ is −inf
        tempered = z / tau
        return Outcome(tempered, before, float(entropy(tempered)), int(tau < 1))


def _largest_temperature(z: "Float64", target: float) -> float:
    from emlocal.em.entropy import entropy

    low, high = math.log(COLDEST), 0.0
    if float(entropy(z / COLDEST)) > target:
        return COLDEST
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        if float(entropy(z / math.exp(middle))) <= target:
            low = middle
        else:
            high = middle
    return math.exp(low)
