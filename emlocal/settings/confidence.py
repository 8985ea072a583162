"""Settings of an answer's confidence, and of the confidence below which an answer is withheld."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from emlocal.settings.table import Table, setting

_setting = partial(setting, panel="Confidence")


@dataclass(frozen=True)
class ConfidenceOptions:
    """Settings of confidence. None: confidence as the method computes it, and every answer is given."""

    calibration: Path | None = _setting(
        None, "--calibration", help="Calibrate confidence with this file, written by eval --calibrate."
    )
    abstain_below: float | None = _setting(
        None, "--abstain-below", 0, 1, "Withhold answers whose confidence is below this.", metavar="P"
    )


CONFIDENCE = Table.of(ConfidenceOptions)
CALIBRATION = CONFIDENCE.only("calibration")
"""The setting for single answers: a person sees the confidence and decides."""
