"""The settings of an EM-RL run, each declared once, and its recipes.

A recipe is a TOML file like a `--config` file, with settings under the names of their flags. Read it, copy
it, change it. A setting that it leaves out has its default. This module imports no numpy, because `--help`
needs it.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from emlocal.errors import UsageError
from emlocal.settings.table import Table, records_of, setting, shown
from emlocal.training.settings import ANSWERS, TRAINING, TrainingSettings

Reward = Literal["token", "sequence", "self-certainty", "majority", "vote", "verifier"]
RewardScale = Literal["sum", "mean"]
Advantage = Literal["rloo", "grpo"]
Loss = Literal["reinforce", "ppo-clip"]
Averaging = Literal["token", "sequence", "sum"]
Regularize = Literal["none", "clip-cov", "kl-cov"]
TokenWeights = Literal["none", "tw-grpo"]

_reward = partial(setting, panel="Reward and policy gradient")
_RECIPES = Path(__file__).with_name("recipes")


def _rewards(given: Any, said: str) -> tuple[tuple[str, float], ...]:
    """Parses rewards.

    The forms are `token`, `verifier=1,token=0.01` and, in a TOML file, also { verifier = 1, token = 0.01 }.
    """
    texts = [given] if isinstance(given, str) else given
    if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
        return tuple(_one_reward(part, said) for text in texts for part in text.split(","))
    if not isinstance(given, dict) or not all(type(weight) in (int, float) for weight in given.values()):
        raise UsageError(f"{said} is {shown(given)}; it must be a name, or a table of names and weights")
    return tuple((name, float(weight)) for name, weight in given.items())


def _one_reward(part: str, said: str) -> tuple[str, float]:
    name, separator, weight = part.partition("=")
    try:
        return name.strip(), float(weight) if separator else 1.0
    except ValueError:
        raise UsageError(
            f"{said} has the weight {weight.strip()!r}, which is not a number",
            "write it as verifier=1,token=0.01",
        ) from None


@dataclass(frozen=True)
class RLSettings(TrainingSettings):
    """The settings that determine the outcome of an EM-RL run; the equations are in `emlocal.em`.

    Raises UsageError, with flag and range, for a bad value.
    """

    samples: int = setting(
        4,
        "--samples --num-generations --n",
        2,
        10**4,
        "Set the number of answers to each prompt of a step.",
        panel=ANSWERS,
    )
    reward: tuple[tuple[Reward, float], ...] = _reward(
        (("token", 1.0),),
        "--reward",
        help="Set the reward: token, sequence, self-certainty, majority, vote or verifier, or"
        " a weighted sum: verifier=1,token=0.01. (default: token)",
        metavar="NAME",
        read=_rewards,
    )
    """Rewards of an answer with their weights in the sum."""
    normalize: RewardScale = _reward(
        "sum",
        "--normalize",
        help="Take the rewards token and sequence as sums (the paper) or means (its code).",
    )
    advantage: Advantage = _reward(
        "rloo", "--advantage", help="Set how an answer's advantage follows from its group's rewards."
    )
    loss: Loss = _reward("reinforce", "--loss", help="Set the policy loss.")
    averaging: Averaging = _reward(
        "token", "--averaging", help="Average the loss over tokens, answers' means or answers' sums."
    )
    """How the tokens' losses are averaged: see `emlocal.em.losses.averaging_weights`."""
    ppo_epochs: int = _reward(
        1, "--ppo-epochs --num-iterations", 1, 100, "Take this many optimiser steps on the same answers."
    )
    clip_low: float = _reward(
        0.2,
        "--clip-low --epsilon",
        0,
        1,
        "Clip the loss where a token's probability fell by this share (ppo-clip).",
    )
    clip_high: float = _reward(
        0.2,
        "--clip-high --epsilon-high",
        0,
        1e3,
        "Clip the loss where a token's probability rose by this share (ppo-clip).",
    )
    kl_beta: float = setting(
        0.001,
        "--kl-beta --beta",
        0,
        1e3,
        "Set the weight of KL(model ‖ base) in the loss (β; estimated by k3).",
        panel=TRAINING,
    )
    entropy_bonus: float = _reward(
        0.0,
        "--entropy-bonus",
        -1e3,
        1e3,
        "Reward entropy with this times H per token. The paper's code has 0.001; -1 adds EM-FT's gradient.",
    )
    regularize: Regularize = _reward(
        "none", "--regularize", help="Restrain the tokens that lower entropy most."
    )
    clip_cov_share: float = _reward(
        2e-4,
        "--clip-cov-share",
        0,
        1,
        "Set the share of tokens without policy gradient (clip-cov).",
        low_is_open=True,
    )
    kl_cov_share: float = _reward(
        2e-3, "--kl-cov-share", 0, 1, "Set the share of tokens with a KL penalty (kl-cov).", low_is_open=True
    )
    kl_cov_pull: float = _reward(1.0, "--kl-cov-pull", 0, 1e3, "Set the weight of that penalty (kl-cov).")
    token_weights: TokenWeights = _reward(
        "none", "--token-weights", help="Weigh tokens by how much the answers disagree at them."
    )
    tw_alpha: float = _reward(1.7, "--tw-alpha", 1, 100, "Set the largest weight of a token (tw-grpo).")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rewards(self.reward)
        if self.regularize == "kl-cov" and self.ppo_epochs == 1:
            raise UsageError(
                "--regularize kl-cov needs a second step on the same answers; --ppo-epochs is 1",
                "use --ppo-epochs 2, or --regularize clip-cov",
            )
        if "majority" in dict(self.reward) and self.samples == 2:
            raise UsageError(
                "--reward majority needs at least three answers; --samples is 2", "use --samples 3"
            )
        if self.regularize == "kl-cov" and self.loss != "ppo-clip":
            raise UsageError("--regularize kl-cov needs the ratio of ppo-clip", "use --loss ppo-clip")
        if self.ppo_epochs > 1 and self.loss != "ppo-clip":
            raise UsageError(
                f"--ppo-epochs is {self.ppo_epochs}; later steps learn from an older"
                " model's answers, which needs the ratio of ppo-clip",
                "use --loss ppo-clip, or --ppo-epochs 1",
            )
        self._check_idle()

    def _check_idle(self) -> None:
        """Raises UsageError for a setting that was changed but has no effect."""
        known = records_of(RLSettings)
        scaled = bool({"token", "sequence"} & dict(self.reward).keys())
        for name, needed, used in (
            ("normalize", "--reward token or sequence", scaled),
            ("clip_low", "--loss ppo-clip", self.loss == "ppo-clip"),
            ("clip_high", "--loss ppo-clip", self.loss == "ppo-clip"),
            ("clip_cov_share", "--regularize clip-cov", self.regularize == "clip-cov"),
            ("kl_cov_share", "--regularize kl-cov", self.regularize == "kl-cov"),
            ("kl_cov_pull", "--regularize kl-cov", self.regularize == "kl-cov"),
            ("tw_alpha", "--token-weights tw-grpo", self.token_weights == "tw-grpo"),  # noqa: S105 (of text)
        ):
            if not used and vars(self)[name] != known[name].default:
                flag = known[name].flag
                raise UsageError(
                    f"{flag} is {vars(self)[name]}, which has no effect without {needed}", f"leave out {flag}"
                )

    @property
    def answers_per_step(self) -> int:
        return self.prompts_per_step * self.samples

    @property
    def needs_labels(self) -> bool:
        """Whether the prompts must come with answers."""
        return "verifier" in dict(self.reward)

    @property
    def needs_scores(self) -> bool:
        """Whether the first update needs scores of the tokens by the model that drew them."""
        of_tokens = {"token", "sequence", "self-certainty"} & dict(self.reward).keys()
        return bool(of_tokens) or self.loss == "ppo-clip" or self.regularize != "none"

    @property
    def needs_reference(self) -> bool:
        """Whether the base model must score the answers, for the loss or only for the guard."""
        return self.kl_beta > 0 or self.max_kl > 0


def _check_rewards(rewards: tuple[tuple[str, float], ...]) -> None:
    names = [name for name, _ in rewards]
    for name in names:
        if name not in get_args(Reward):
            raise UsageError(f"--reward is {name!r}; it must be {' or '.join(get_args(Reward))}")
    if not names or len(set(names)) < len(names):
        raise UsageError("--reward names no reward, or one twice", "use --reward token")
    for name, weight in rewards:
        if not math.isfinite(weight) or weight == 0:
            raise UsageError(f"the weight of the reward {name} is {weight:g}; it must be a number, not 0")


def recipes() -> list[str]:
    """Returns the names of the recipes that come with emlocal."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """Reads a recipe by name, or a TOML file by path (it ends in .toml); returns {field: value}.

    Raises UsageError if it does not exist or cannot be read, and for settings that are unknown, of the wrong
    type or out of range.
    """
    from emlocal.settings.resolve import read_settings

    if isinstance(name, str) and not name.endswith(".toml"):
        if name not in recipes():
            raise UsageError(f"there is no recipe {name}", f"use one of these: {', '.join(recipes())}")
        name = _RECIPES / f"{name}.toml"
    return read_settings(Path(name), Table.of(RLSettings))
