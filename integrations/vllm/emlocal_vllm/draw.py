"""emlocal's draw on the device: addressed uniforms, truncation, inverse CDF.

Each token's uniform is Philox4x64-10 with key (seed, request key) and counter (token index, sample), as in
emlocal.sampling.draw, so it does not depend on the batch or the engine. Source: Salmon et al. 2011. NumPy's
generator counts up before its first block, so token t is word t mod 4 of block t // 4 + 1.

Torch has no unsigned 64-bit product. Int64 products wrap, which is what is needed of the low half; the high
half is made of 32-bit parts.
"""

import math

import torch
from torch import Tensor

COLDEST = 1e-9
"""The lowest temperature besides 0."""
_HALF = 0xFFFFFFFF
_FACTORS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def signed(value: int) -> int:
    """Returns the int64 with the bits of an unsigned number."""
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value


def uniforms(seed: Tensor, key: Tensor, sample: Tensor, token: Tensor) -> Tensor:
    """Returns u in [0, 1) for each row; all int64 [R], u float64 [R].

    `seed` and `key` are the bits of unsigned numbers.
    """
    device = seed.device
    m = torch.tensor([[signed(each)] for each in _FACTORS], device=device)
    weyl = torch.tensor([[signed(each)] for each in _WEYL], device=device)
    zero = torch.zeros_like(token)
    even = torch.stack([token // 4 + 1, zero])  # counters 0 and 2
    odd = torch.stack([sample, zero])  # counters 1 and 3
    keys = torch.stack([seed, key])
    for _ in range(10):
        high, low = _product(even, m)
        even, odd = high.flip(0) ^ odd ^ keys, low.flip(0)
        keys = keys + weyl
    words = torch.stack([even[0], odd[0], even[1], odd[1]])
    word = words.gather(0, (token % 4)[None])[0]
    return ((word >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the high and the low half of unsigned products."""
    a1, a0, b1, b0 = (a >> 32) & _HALF, a & _HALF, (b >> 32) & _HALF, b & _HALF
    low, cross, other = a0 * b0, a0 * b1, a1 * b0
    middle = ((low >> 32) & _HALF) + (cross & _HALF) + (other & _HALF)
    high = a1 * b1 + ((cross >> 32) & _HALF) + ((other >> 32) & _HALF) + ((middle >> 32) & _HALF)
    return high, a * b


def choose(
    z: Tensor, u: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, ordered: bool
) -> Tensor:
    """Returns the tokens that u draws, int64 [R, 1]: temperature, top-k, top-p, min-p, inverse CDF.

    Args:
        z: logits after the EM step, float32 [R, V].
        u, temperature, top_k, top_p, min_p: float64 [R, 1]; top_k 0 keeps all tokens.
        ordered: whether some row has top-k or top-p, which needs a sort.
    """
    shifted = z.double() - z.amax(-1, keepdim=True).double()
    greedy = temperature == 0
    weights = torch.where(greedy, (shifted == 0).double(), (shifted / temperature.clamp_min(COLDEST)).exp())
    if ordered:
        weights = _largest(weights, top_k, top_p)
    weights = torch.where(weights >= min_p, weights, 0.0)  # the largest weight is 1
    cumulative = weights.cumsum(-1)
    target = torch.where(greedy, 0.0, u) * cumulative[:, -1:]
    token = (cumulative <= target).sum(-1, keepdim=True)
    places = torch.arange(z.shape[-1], device=z.device)
    last = torch.where(weights > 0, places, 0).amax(-1, keepdim=True)
    return torch.minimum(token, last)  # where rounding leaves none


def _largest(weights: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Applies top-k, then top-p: dropped tokens get weight 0. Among equal weights the lower ids stay."""
    V = weights.shape[-1]
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(V, device=weights.device)
    kept = torch.where(ranks < torch.where(top_k > 0, top_k, V), ordered, 0.0)
    sums = kept.cumsum(-1)
    nucleus = (sums < top_p * sums[:, -1:]).sum(-1, keepdim=True) + 1
    kept = torch.where((ranks < nucleus) | (top_p >= 1), kept, 0.0)
    return torch.zeros_like(weights).scatter(-1, order, kept)


def only(z: Tensor, token: Tensor) -> Tensor:
    """Returns rows where the given tokens alone are possible, like z."""
    return torch.full_like(z, -math.inf).scatter(-1, token, 0.0)
