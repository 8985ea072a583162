"""The flags that are `emlocal rl`'s own."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from emlocal.cli.options import flag, number_flag
from emlocal.cli.training_options import ANSWERS, TRAINING, CommonOptions
from emlocal.training.rl_settings import RLSettings

REWARD = "Reward and policy gradient"


class Scale(StrEnum):
    sum = "sum"
    mean = "mean"


class AdvantageChoice(StrEnum):
    rloo = "rloo"
    grpo = "grpo"


class LossChoice(StrEnum):
    reinforce = "reinforce"
    ppo_clip = "ppo-clip"


class AveragingChoice(StrEnum):
    token = "token"  # noqa: S105
    sequence = "sequence"
    sum = "sum"


class RegularizeChoice(StrEnum):
    none = "none"
    clip_cov = "clip-cov"
    kl_cov = "kl-cov"


class TokenWeightsChoice(StrEnum):
    none = "none"
    tw_grpo = "tw-grpo"


def _setting(name: str, metavar: str = "X", panel: str = REWARD) -> Any:
    return number_flag(RLSettings, name, panel, metavar)


@dataclass(frozen=True)
class RLOptions(CommonOptions):
    """What decides the outcome; see RLSettings. None: as the recipe says."""

    samples: Annotated[int | None, _setting("samples", "N", ANSWERS)] = None
    reward: Annotated[
        str | None,
        flag(
            REWARD,
            "--reward",
            help="token, sequence, self-certainty, majority, vote or verifier; or a weighted sum:"
            " verifier=1,token=0.01. (default: token)",
            metavar="NAME",
        ),
    ] = None
    normalize: Annotated[
        Scale | None,
        flag(
            REWARD,
            "--normalize",
            help="Of the rewards token and sequence: the paper's sums, or the released code's means."
            " (default: sum)",
        ),
    ] = None
    advantage: Annotated[
        AdvantageChoice | None,
        flag(REWARD, "--advantage", help="Of an answer against the others. (default: rloo)"),
    ] = None
    loss: Annotated[LossChoice | None, flag(REWARD, "--loss", help="Of the policy. (default: reinforce)")] = (
        None
    )
    averaging: Annotated[
        AveragingChoice | None,
        flag(
            REWARD,
            "--averaging",
            help="Mean over tokens; over answers of means; over answers of sums. (default: token)",
        ),
    ] = None
    ppo_epochs: Annotated[int | None, _setting("ppo_epochs", "N")] = None
    clip_low: Annotated[float | None, _setting("clip_low")] = None
    clip_high: Annotated[float | None, _setting("clip_high")] = None
    kl_beta: Annotated[float | None, _setting("kl_beta", panel=TRAINING)] = None
    entropy_bonus: Annotated[float | None, _setting("entropy_bonus")] = None
    regularize: Annotated[
        RegularizeChoice | None,
        flag(REWARD, "--regularize", help="Hold back the tokens that lower entropy most. (default: none)"),
    ] = None
    clip_cov_share: Annotated[float | None, _setting("clip_cov_share")] = None
    kl_cov_share: Annotated[float | None, _setting("kl_cov_share")] = None
    kl_cov_pull: Annotated[float | None, _setting("kl_cov_pull")] = None
    token_weights: Annotated[
        TokenWeightsChoice | None,
        flag(
            REWARD, "--token-weights", help="Weigh tokens by how much answers disagree there. (default: none)"
        ),
    ] = None
    tw_alpha: Annotated[float | None, _setting("tw_alpha")] = None
