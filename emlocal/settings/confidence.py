"""How sure an answer is, and what becomes of one that is not sure enough."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from emlocal.settings.table import Table, setting

_setting = partial(setting, panel="Confidence")


@dataclass(frozen=True)
class ConfidenceOptions:
    """None: confidence as the method has it, and every answer is given."""

    calibration: Path | None = _setting(
        None, "--calibration", help="Calibrate the confidence with this file of eval --calibrate."
    )
    abstain_below: float | None = _setting(
        None, "--abstain-below", 0, 1, "Withhold answers whose confidence is lower.", metavar="P"
    )


CONFIDENCE = Table.of(ConfidenceOptions)
CALIBRATION = CONFIDENCE.only("calibration")
"""For single answers: a person sees the confidence and decides."""
