"""Settings that know their flag, their range and their meaning: declared once, checked everywhere.

A settings dataclass declares each number with `setting(...)` and calls `check_settings(self)` in
`__post_init__`; the command line takes its help texts from the same place.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from emlocal.errors import UsageError


@dataclass(frozen=True)
class Setting:
    """What a person needs to know of one number."""

    flag: str
    low: float
    high: float
    help: str
    low_is_open: bool = False

    def span(self) -> str:
        """The range in words: "between 0 and 1", "at least 0", "more than 0"."""
        if math.isinf(self.high):
            return f"more than {self.low:g}" if self.low_is_open else f"at least {self.low:g}"
        return f"{'more than ' if self.low_is_open else 'between '}{self.low:g} and {self.high:g}"


def setting(default: Any, flag: str, low: float, high: float, help: str, *, low_is_open: bool = False) -> Any:
    """A dataclass field with a default and a Setting."""
    return field(default=default, metadata={"setting": Setting(flag, low, high, help, low_is_open)})


def settings_of(cls: Any) -> dict[str, Setting]:
    """The settings of a dataclass, by field name."""
    return {f.name: f.metadata["setting"] for f in fields(cls) if "setting" in f.metadata}


def check_settings(values: Any) -> None:
    """Raise UsageError for the first number of a settings dataclass that lies outside its range."""
    for name, known in settings_of(values).items():
        value = vars(values)[name]
        if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
            raise UsageError(f"{known.flag} is {value!r}; it must be a number {known.span()}")
        too_low = value <= known.low if known.low_is_open else value < known.low
        if too_low or value > known.high or math.isinf(value):
            raise UsageError(f"{known.flag} is {value:g}; it must be {known.span()}")
