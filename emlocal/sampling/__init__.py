"""From a row of logits to a token: the order of the steps, and the random draw. One meaning on every engine.

raw logits → penalties and bias → EM step → temperature → top-k → top-p → min-p → inverse-CDF draw
"""

from emlocal.sampling.draw import Draw, Uniforms
from emlocal.sampling.sampler import Sampler
from emlocal.settings import EMStep, SamplingParams

__all__ = ["Draw", "EMStep", "Sampler", "SamplingParams", "Uniforms"]
