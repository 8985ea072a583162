"""The EM steps' settings, the presets, and the table of what switches steps on and sets them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from emlocal.settings.table import Setting, Table, check_settings, records_of, setting

PANEL = "Entropy minimization"


@dataclass(frozen=True)
class EMInf:
    """Settings of EM-INF. Raises UsageError, with flag and range, for a value out of range."""

    name: ClassVar[str] = "em-inf"
    flag: ClassVar[str] = "--em-inf"
    help: ClassVar[str] = "Minimize each token's entropy while decoding."

    threshold: float = setting(
        0.3, "--em-threshold", 0, math.inf, "δ in nats: leave rows below it alone.", unit="nats"
    )
    """A row at H ≤ δ is left alone. δ = 0 never stops early, δ ≥ log V never starts."""
    steps: int = setting(10, "--em-steps", 0, 1000, "Most gradient steps per token.")
    learning_rate: float = setting(2.0, "--em-learning-rate", 0, 1e6, "η, size of a step.", low_is_open=True)
    optimizer: Literal["sgd", "adam"] = setting("sgd", "--em-optimizer", help="How steps are taken.")
    """sgd is the paper's descent; adam is what the authors' code runs, fresh for every token."""
    kl_weight: float = setting(0.0, "--em-kl-weight", 0, 1e6, "κ, weight of KL(original ‖ new).")

    def __post_init__(self) -> None:
        check_settings(self)

    def describe(self) -> str:
        """The step in words."""
        kl = f", κ {self.kl_weight:g}" if self.kl_weight else ""
        return f"δ {self.threshold:g}, ≤ {self.steps} steps of {self.learning_rate:g} ({self.optimizer}{kl})"


@dataclass(frozen=True)
class AdaptiveTemperature:
    """Settings. The paper found ratios between 0.4 and 0.6 best."""

    name: ClassVar[str] = "adaptive-temperature"
    flag: ClassVar[str] = "--adaptive-temp"
    help: ClassVar[str] = "Cool each token to a target entropy instead."

    ratio: float = setting(0.5, "--em-ratio", 0, 1, "α of adaptive temperature: share of the entropy kept.")
    threshold: float = setting(
        0.1, "--em-threshold", 0, math.inf, "δ in nats: cool no further than to this entropy.", unit="nats"
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def describe(self) -> str:
        """The step in words."""
        return f"adaptive temperature, α {self.ratio:g}, δ {self.threshold:g}"


EMStep = EMInf | AdaptiveTemperature
"""The entropy-minimizing step of the pipeline; None where there is none."""

EM_STEPS: tuple[type[EMStep], ...] = (EMInf, AdaptiveTemperature)
"""All steps. Their flags, keys and fields come from this table."""


def describe_em(step: EMStep | None) -> str:
    """An EM step in words."""
    return "off" if step is None else step.describe()


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


def named(known: Setting) -> Setting:
    """A step's setting under the name that it has beside the others': em_threshold, not threshold."""
    return replace(known, name=known.flag.removeprefix("--").replace("-", "_"), panel=known.panel or PANEL)


def switch_of(step: type[EMStep]) -> Setting:
    """What switches a step on and off."""
    off = f"--no-{step.flag.removeprefix('--')}"
    switch = Setting(step.flag, help=step.help, kind="switch", default=False, off=off)
    return named(switch)


def em_numbers(step: type[EMStep]) -> dict[str, Setting]:
    """The settings of a step, by the names that they have beside other steps' ones."""
    return {known.name: known for known in map(named, records_of(step).values())}


PRESET = Setting(
    "--em-preset",
    help="EM-INF settings: paper is eq. 5, em-pt the authors' code. Implies --em-inf.",
    name="em_preset",
    kind="choice",
    choices=tuple(EM_PRESETS),
    panel=PANEL,
)


def em_table(steps: Sequence[type[EMStep]]) -> Table:
    """The switch of each step, the preset, and the steps' settings. Steps may share one, under one flag."""
    settings = {switch.name: switch for switch in map(switch_of, steps)} | {PRESET.name: PRESET}
    for step in steps:
        for name, known in em_numbers(step).items():
            first = settings.setdefault(name, known)
            if first.default != known.default:
                both = f"(default: {first.default:g}; {known.default:g} with {step.flag})"
                settings[name] = replace(first, help=f"{first.help} {both}")
    return Table(settings)


EM = em_table(EM_STEPS)
