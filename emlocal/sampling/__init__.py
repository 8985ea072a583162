"""From a row of logits to a token: the order of the steps, and the random draw. Every engine does the same.

raw logits → penalties and bias → mask of legal tokens → EM step → temperature → top-k → top-p → min-p
→ inverse-CDF draw
"""

from emlocal.sampling.draw import Draw, Mask, Uniforms
from emlocal.sampling.sampler import Sampler
from emlocal.settings import EMStep, SamplingParams

__all__ = ["Draw", "EMStep", "Mask", "Sampler", "SamplingParams", "Uniforms"]
