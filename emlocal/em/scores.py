"""Scores of one answer: how sure the model was while it wrote it, from numbers that decoding computes anyway.

All of them are about the model's own distribution, before the EM step, temperature and truncation. Sources:
means and windows of DeepConf (arXiv 2508.15260), with windows of 32 tokens instead of 2,048, since answers
are short; summed and mean log-probability as in the literature on best-of-N.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

WINDOW = 32
"""Tokens in a window, and in the tail of the answer."""
UNSURE = 1.0
"""Nats; at a token with more entropy the model was unsure."""


@dataclass(frozen=True)
class Scores:
    """The scores of one answer, which has at least one token. Entropies in nats, logarithms natural."""

    tokens: int
    mean_entropy: float
    largest_entropy: float
    """Largest entropy of a single token."""
    window_entropy: float
    """Largest mean over `WINDOW` consecutive tokens; the mean of all if the answer is shorter."""
    tail_entropy: float
    """Mean of the last `WINDOW` tokens."""
    unsure: float
    """Share of tokens with more than `UNSURE` nats."""
    log_probability: float
    """Log-probability of the whole answer, the end token included: a sum over tokens."""
    mean_log_probability: float
    answer_entropy: float | None = None
    """Mean over the tokens of the answer proper: the content of the box, or the last number.

    None if it is not known which tokens these are.
    """

    def as_json(self) -> dict[str, float | int | None]:
        """Returns the scores for output files; nats and shares to six decimal places."""
        return {
            name: round(value, 6) if isinstance(value, float) else value for name, value in vars(self).items()
        }


RANKED: Mapping[str, Callable[[Scores], float]] = {
    "mean-entropy": lambda s: -s.mean_entropy,
    "tail-entropy": lambda s: -s.tail_entropy,
    "window-entropy": lambda s: -s.window_entropy,
    "largest-entropy": lambda s: -s.largest_entropy,
    "answer-entropy": lambda s: -(s.mean_entropy if s.answer_entropy is None else s.answer_entropy),
    "unsure": lambda s: -s.unsure,
    "log-probability": lambda s: s.log_probability,
    "mean-log-probability": lambda s: s.mean_log_probability,
}
"""The functions that rank answers by a score, by name: the greater, the surer."""


def scores(entropies: Sequence[float], probabilities: Sequence[float], answer: slice | None = None) -> Scores:
    """Returns the scores of one answer.

    Args:
        entropies: of each token's distribution, nats.
        probabilities: of each token, before temperature and truncation.
        answer: which tokens are the answer proper.
    Raises ValueError for an answer without tokens.
    """
    n = len(entropies)
    if n == 0 or n != len(probabilities):
        raise ValueError(
            f"an answer of {n} entropies and {len(probabilities)} probabilities cannot be scored"
        )
    logs = _logs(probabilities)
    own = entropies[answer] if answer is not None else ()
    return Scores(
        tokens=n,
        mean_entropy=fmean(entropies),
        largest_entropy=max(entropies),
        window_entropy=_largest_window(entropies),
        tail_entropy=fmean(entropies[-WINDOW:]),
        unsure=sum(h > UNSURE for h in entropies) / n,
        log_probability=math.fsum(logs),
        mean_log_probability=math.fsum(logs) / n,
        answer_entropy=fmean(own) if own else None,
    )


_LEAST = 1e-45  # float32's smallest: a token that was drawn had some probability


def mean_log_probability(probabilities: Sequence[float]) -> float:
    """Returns the mean log-probability of a text's tokens, in nats per token; the text has at least one."""
    return math.fsum(_logs(probabilities)) / len(probabilities)


def _logs(probabilities: Sequence[float]) -> list[float]:
    return [math.log(max(p, _LEAST)) for p in probabilities]


def _largest_window(entropies: Sequence[float]) -> float:
    width = min(WINDOW, len(entropies))
    total = largest = math.fsum(entropies[:width])
    for new, old in zip(entropies[width:], entropies, strict=False):
        total += new - old
        largest = max(largest, total)
    return largest / width
