"""What EM did to an answer, in a few numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from emlocal.sampling import Draw


@dataclass(frozen=True)
class EntropySummary:
    """What EM did to an answer, over its tokens."""

    tokens: int
    before: float
    """Mean entropy before EM, nats."""
    after: float
    touched: float
    """Share of tokens at which EM took a step."""
    changed: float
    """Share of tokens that the same draw would have made another token without EM."""
    steps: float
    """Mean EM steps a token."""

    def as_json(self) -> dict[str, float]:
        """For output files; nats and shares to six places."""
        return {
            "mean_before": round(self.before, 6),
            "mean_after": round(self.after, 6),
            "touched": round(self.touched, 6),
            "changed": round(self.changed, 6),
            "mean_steps": round(self.steps, 6),
        }


def summarize(draws: Sequence[Draw]) -> EntropySummary:
    """The summary of one or more answers' draws."""
    n = max(1, len(draws))
    return EntropySummary(
        len(draws),
        sum(d.entropy_before for d in draws) / n,
        sum(d.entropy_after for d in draws) / n,
        sum(d.steps > 0 for d in draws) / n,
        sum(d.token != d.token_without_em for d in draws) / n,
        sum(d.steps for d in draws) / n,
    )
