"""The tokens that could have come instead of the one drawn, with their probabilities before and after EM."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from emlocal.em.entropy import log_softmax
from emlocal.sampling import SamplingParams
from emlocal.sampling.draw import Mask, adjust, illegal

MOST = 20
"""The largest number for one row, which is OpenAI's limit."""


class Alternative(NamedTuple):
    """A token of high probability at one place of an answer."""

    token: int
    log_p_before: float
    """Log-probability after penalties and before EM, in nats; −inf for a banned token."""
    log_p_after: float
    """Log-probability after the EM step, before temperature and truncation."""


def alternatives(
    logits: NDArray[np.float32],
    params: SamplingParams,
    seen: Sequence[int],
    most: int,
    legal: Mask | None = None,
) -> tuple[Alternative, ...]:
    """Returns the `most` most probable tokens before EM, the most probable first.

    Args:
        logits: the raw row, [V].
        seen: the tokens so far, for the penalties.
        legal: the tokens that may be drawn; None for all.
    Raises LogitsError for a row that is not a distribution.
    """
    z = adjust(logits, params, seen).astype(np.float64)
    if legal is not None:
        z[illegal(legal, len(z))] = -np.inf
    before = log_softmax(z)
    after = before if params.em is None else log_softmax(params.em.reference(z).logits)
    most = min(most, len(z))
    top = np.argpartition(-before, most - 1)[:most]
    top = top[np.lexsort((top, -before[top]))]
    return tuple(Alternative(int(i), float(before[i]), float(after[i])) for i in top)
