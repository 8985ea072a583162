"""The flags that are `emlocal finetune`'s own."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from emlocal.cli.options import flag, number_flag
from emlocal.cli.training_options import TRAINING, CommonOptions
from emlocal.training.settings import FineTuneSettings


class Recipe(StrEnum):
    default = "default"
    paper = "paper"
    one_shot = "one-shot"


class Normalization(StrEnum):
    token = "token"  # noqa: S105
    sequence = "sequence"


@dataclass(frozen=True)
class TrainingOptions(CommonOptions):
    """What decides the outcome; see FineTuneSettings. None: as the recipe says."""

    kl_beta: Annotated[float | None, number_flag(FineTuneSettings, "kl_beta", TRAINING, "X")] = None
    temperature: Annotated[float | None, number_flag(FineTuneSettings, "temperature", TRAINING, "X")] = None
    normalize: Annotated[
        Normalization | None,
        flag(
            TRAINING,
            "--normalize",
            help="Mean over tokens, or the paper's sum over each answer. (default: token)",
        ),
    ] = None
