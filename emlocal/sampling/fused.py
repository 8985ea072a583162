"""The sampler's usual way in compiled code (`_fused.c`): a row to a draw in one call, several times faster.

It needs GCC or clang when emlocal is installed. Without them `Fused.where_built` gives None and numpy does
the same work: same tokens, more time.
"""

import math

from emlocal.em.split import Float32
from emlocal.em.steps import EMInf
from emlocal.sampling.draw import Draw
from emlocal.settings import SamplingParams

try:
    from emlocal.sampling import _fused
except ImportError:
    BUILT = False
else:
    BUILT = True

_NO_STEP = (math.inf, 0, 1.0)


class Fused:
    """Draws from rows of one vocabulary; owns the memory for it. Not for use from two threads at once."""

    def __init__(self, vocabulary: int) -> None:
        self._row_bytes = 4 * vocabulary
        self._scratch = bytearray(_fused.scratch_bytes(vocabulary))

    @classmethod
    def where_built(cls, vocabulary: int) -> "Fused | None":
        """One for this vocabulary; None where emlocal was installed without a compiler."""
        return cls(vocabulary) if BUILT else None

    def draw(self, row: Float32, params: SamplingParams, u: float) -> Draw | None:
        """A token from `row`, float32 [V], after penalties; None where the row or the settings are not usual:
        Adam, a KL term, other EM steps, flat or extreme rows, ranks that reach into the tail."""
        em = params.em
        if em is None:
            step = _NO_STEP
        elif type(em) is EMInf and em.optimizer == "sgd" and em.kl_weight == 0:
            step = (em.threshold, em.steps, em.learning_rate)
        else:
            return None
        if row.nbytes != self._row_bytes:  # not float32 [V]: let numpy say what is wrong
            return None
        drawn = _fused.draw(
            row,
            self._scratch,
            *step,
            params.temperature,
            params.dynatemp_range,
            params.dynatemp_exponent,
            params.top_k,
            params.top_p,
            params.min_p,
            u,
        )
        return None if drawn is None else Draw._make(drawn)
