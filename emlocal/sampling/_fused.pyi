from emlocal.em.split import Float32
from emlocal.sampling.draw import Mask

def draw(
    row: Float32,
    scratch: bytearray,
    kind: int,
    threshold: float,
    steps: int,
    learning_rate: float,
    kl_weight: float,
    alpha: float,
    temperature: float,
    dynatemp_range: float,
    dynatemp_exponent: float,
    top_k: int,
    top_p: float,
    min_p: float,
    u: float,
) -> tuple[int, float, float, int, float, float, int] | None:
    """The fields of a Draw; None where the fast path cannot take the row or promise its accuracy.

    `kind`: 0 for no EM step, 1 and 2 for EM-INF by gradient descent and by Adam, 3 for adaptive temperature,
    4 for power. `alpha`: of 3 the share of the entropy that is kept, of 4 the exponent.
    `row` is contiguous float32 [V]. Raises ValueError for an empty row or too small a scratch buffer.
    """

def draw_legal(
    row: Float32,
    scratch: bytearray,
    kind: int,
    threshold: float,
    steps: int,
    learning_rate: float,
    kl_weight: float,
    alpha: float,
    temperature: float,
    dynatemp_range: float,
    dynatemp_exponent: float,
    top_k: int,
    top_p: float,
    min_p: float,
    u: float,
    mask: Mask,
    legal: bytearray,
) -> tuple[int, float, float, int, float, float, int] | None:
    """The same where only the tokens of `mask` can be drawn. `legal`: 8 bytes a token, for their logits and
    ids. Raises ValueError for too short a mask or buffer, too."""

def scratch_bytes(vocabulary: int) -> int:
    """How large `scratch` must be."""

def limit_width(most: int) -> int:
    """Use vector registers of at most so many bytes (16, 32, 64); returns what is used. For tests."""
