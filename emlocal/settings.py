"""The numbers people set: EM-INF, adaptive temperature, sampling, and the presets.

Each is declared once, with its flag, range and meaning; the checks, the error messages and the command
line's help come from here. No numpy: `emlocal --help` must be quick.
"""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from emlocal.errors import UsageError

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Setting:
    """What a person needs to know of one number."""

    flag: str
    low: float
    high: float
    help: str
    low_is_open: bool = False
    whole: bool = False

    def span(self) -> str:
        """The range in words: "between 0 and 1", "at least 0", "more than 0 and at most 1"."""
        if math.isinf(self.high):
            return f"more than {self.low:g}" if self.low_is_open else f"at least {self.low:g}"
        if self.low_is_open:
            return f"more than {self.low:g} and at most {self.high:g}"
        return f"between {self.low:g} and {self.high:g}"


def setting(default: Any, flag: str, low: float, high: float, help: str, *, low_is_open: bool = False) -> Any:
    """A dataclass field with a default and a Setting; whole numbers are those whose default is one."""
    known = Setting(flag, low, high, help, low_is_open, whole=isinstance(default, int))
    return field(default=default, metadata={"setting": known})


def settings_of(cls: Any) -> dict[str, Setting]:
    """The settings of a dataclass, by field name."""
    return {f.name: f.metadata["setting"] for f in fields(cls) if "setting" in f.metadata}


DEFAULT_MAX_TOKENS = 1024
"""Of an answer, where nobody says."""


def check_settings(values: Any) -> None:
    """Raise UsageError for the first number of a settings dataclass that lies outside its range."""
    for name, known in settings_of(values).items():
        value = vars(values)[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
            raise UsageError(f"{known.flag} is {value!r}; it must be a number {known.span()}")
        if known.whole and not isinstance(value, int):
            raise UsageError(f"{known.flag} is {value!r}; it must be a whole number {known.span()}")
        too_low = value <= known.low if known.low_is_open else value < known.low
        if too_low or value > known.high or math.isinf(value):
            raise UsageError(f"{known.flag} is {value:g}; it must be {known.span()}")


@dataclass(frozen=True)
class EMInf:
    """Settings of EM-INF. Raises UsageError, with flag and range, for a value that cannot be meant."""

    threshold: float = setting(
        0.3, "--em-threshold", 0, math.inf, "δ in nats: descend until the entropy is no more than this."
    )
    """A row at H ≤ δ is left alone. δ = 0 never stops early, δ ≥ log V never starts."""
    steps: int = setting(10, "--em-steps", 0, 1000, "The most gradient steps per token.")
    learning_rate: float = setting(
        2.0, "--em-learning-rate", 0, 1e6, "η, the size of a gradient step on the logits.", low_is_open=True
    )
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd is the paper's descent; adam is what the authors' code runs, fresh for every token."""
    kl_weight: float = setting(
        0.0, "--em-kl-weight", 0, 1e6, "κ, the weight of KL(original ‖ new) beside the entropy."
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.optimizer not in ("sgd", "adam"):
            raise UsageError(f"--em-optimizer is {self.optimizer!r}; it must be sgd or adam")


@dataclass(frozen=True)
class AdaptiveTemperature:
    """Settings. The paper found ratios between 0.4 and 0.6 best."""

    ratio: float = setting(
        0.5, "--em-ratio", 0, 1, "α: cool until the entropy is this share of what it was …"
    )
    threshold: float = setting(
        0.1, "--em-threshold", 0, math.inf, "δ in nats: … but no further than to this entropy."
    )

    def __post_init__(self) -> None:
        check_settings(self)


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
    dynatemp_range: float = setting(
        0.0, "--dynatemp-range", 0, 100, "Temperature ± this, by the entropy of the row (0 = off)."
    )
    """llama.cpp's dynamic temperature: hotter where the model is unsure. A rival of EM, for comparison."""
    dynatemp_exponent: float = setting(
        1.0, "--dynatemp-exp", 0, 100, "Power of the entropy's share of its maximum in --dynatemp-range."
    )
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

    def temperature_at(self, entropy: float, vocabulary: int) -> float:
        """The temperature of a row with this entropy (nats) over so many tokens."""
        if self.dynatemp_range == 0 or vocabulary == 1:
            return self.temperature
        low = max(0.0, self.temperature - self.dynatemp_range)
        share = min(1.0, entropy / math.log(vocabulary))
        return float(low + (self.temperature + self.dynatemp_range - low) * share**self.dynatemp_exponent)

    def without_em(self) -> "SamplingParams":
        """The same with the EM step off: the other side of a comparison."""
        return replace(self, em=None)


def describe_em(step: EMStep | None) -> str:
    """An EM step in words."""
    if step is None:
        return "off"
    if isinstance(step, EMInf):
        kl = f", κ {step.kl_weight:g}" if step.kl_weight else ""
        return f"δ {step.threshold:g}, ≤ {step.steps} steps of {step.learning_rate:g} ({step.optimizer}{kl})"
    return f"adaptive temperature, α {step.ratio:g}, δ {step.threshold:g}"


EM_PRESETS: dict[str, tuple[EMStep, dict[str, Any]]] = {
    # The step, and the sampling settings that go with it where the user has not set them.
    "default": (EMInf(), {}),
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
