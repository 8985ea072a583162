"""The numbers people set: how one is declared and checked, and those of sampling.

Each is declared once, with its flag, range and meaning; the checks, the error messages and the command
line's help come from here. An EM step's are in its own file (`emlocal.em.steps`). No numpy: `emlocal --help`
must be quick.
"""

import math
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from emlocal.em import EMStep as EMStep
from emlocal.em import describe_em as describe_em
from emlocal.errors import UsageError

if TYPE_CHECKING:
    from emlocal.em.steps.adaptive_temperature import AdaptiveTemperature as AdaptiveTemperature
    from emlocal.em.steps.em_inf import EM_PRESETS as EM_PRESETS
    from emlocal.em.steps.em_inf import EMInf as EMInf

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


_STEPS = {
    "AdaptiveTemperature": "emlocal.em.steps.adaptive_temperature",
    "EMInf": "emlocal.em.steps.em_inf",
    "EM_PRESETS": "emlocal.em.steps.em_inf",
}


def __getattr__(name: str) -> object:
    """The EM steps' settings by their old address: their files use this one, so it loads them when asked."""
    if name not in _STEPS:
        raise AttributeError(f"module 'emlocal.settings' has no attribute {name!r}")
    return vars(import_module(_STEPS[name]))[name]
