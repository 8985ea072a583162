"""The method, in numpy: entropy, EM-INF and adaptive temperature, and their fast path for decoding.

`entropy`, `em_inf` and `adaptive_temperature` are the reference: full vocabulary, float64, written to be
read beside the paper (Agarwal et al. 2025, arXiv 2505.15134). `split` is the fast path that decoding uses,
and it answers to the reference. Everything here is about distributions; tokens, text and engines are not.
"""

from emlocal.em.adaptive_temperature import adaptive_temperature
from emlocal.em.em_inf import EMResult, em_inf
from emlocal.em.entropy import entropy, entropy_gradient, log_softmax
from emlocal.settings import AdaptiveTemperature, EMInf

__all__ = [
    "AdaptiveTemperature",
    "EMInf",
    "EMResult",
    "adaptive_temperature",
    "em_inf",
    "entropy",
    "entropy_gradient",
    "log_softmax",
]
