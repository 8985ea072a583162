"""How a token is chosen from a row of logits: the numbers people set, their ranges, and the presets."""

import math
from dataclasses import dataclass, replace
from typing import Any

from emlocal.em import AdaptiveTemperature, EMInf
from emlocal.errors import UsageError
from emlocal.ranges import check_settings, setting

EMStep = EMInf | AdaptiveTemperature
"""The entropy-minimizing step of the pipeline; None where there is none."""


@dataclass(frozen=True)
class SamplingParams:
    """One row's settings, in the order in which they act. Raises UsageError for a value out of range."""

    repeat_penalty: float = setting(
        1.0,
        "--repeat-penalty",
        0,
        100,
        "Divide a repeated token's positive logit, multiply its negative one (1 = off).",
        low_is_open=True,
    )
    presence_penalty: float = setting(
        0.0, "--presence-penalty", -100, 100, "Subtract from the logit of every token seen (0 = off)."
    )
    frequency_penalty: float = setting(
        0.0, "--frequency-penalty", -100, 100, "Subtract from a token's logit per time it was seen (0 = off)."
    )
    repeat_last_n: int = setting(
        64, "--repeat-last-n", -1, 10**9, "Tokens the penalties look back at (-1 = all, 0 = none)."
    )
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what to add to its logit); −inf bans the token."""
    em: EMStep | None = None
    temperature: float = setting(0.8, "--temp", 0, 100, "Sampling temperature, after EM (0 = greedy).")
    top_k: int = setting(0, "--top-k", 0, 10**9, "Keep the k most probable tokens (0 = all).")
    top_p: float = setting(
        1.0, "--top-p", 0, 1, "Keep the most probable tokens that sum to this (1 = all).", low_is_open=True
    )
    min_p: float = setting(
        0.05, "--min-p", 0, 1, "Drop tokens below this share of the most probable token (0 = none)."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        for token, bias in self.logit_bias:
            if token < 0 or math.isnan(bias) or bias == math.inf:
                raise UsageError(
                    f"--logit-bias {token}={bias:g}: the token id is ≥ 0, the bias a number or -inf"
                )

    @property
    def penalizes(self) -> bool:
        """Whether the tokens seen so far matter."""
        off = (self.repeat_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return not off and self.repeat_last_n != 0

    def without_em(self) -> "SamplingParams":
        """The same with the EM step off: the other side of a comparison."""
        return replace(self, em=None)


EM_PRESETS: dict[str, tuple[EMStep, dict[str, Any]]] = {
    # The step, and the sampling settings that go with it where the user has not set them.
    "default": (EMInf(threshold=0.3, steps=10, learning_rate=1.0), {}),
    # Paper §4: eq. 5, "0.1 < δ < 0.5 works best", "5 to 15 gradient steps are enough", then sample.
    # Its η is not stated; 1 reaches δ within the range on the bench models' logits.
    "paper": (
        EMInf(threshold=0.3, steps=15, learning_rate=1.0),
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    ),
    # The authors' released settings: EM-INF/em_inf_eval.sh, which samples at T = 0.1 afterwards.
    "em-pt": (
        EMInf(threshold=0.3, steps=3, learning_rate=0.1, optimizer="adam", kl_weight=0.05),
        {"temperature": 0.1, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    ),
}
