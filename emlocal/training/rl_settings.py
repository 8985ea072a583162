"""The numbers of an EM-RL run, each declared once, and the recipes. No numpy: `--help` reads this.

A recipe is a TOML file of settings under the names of their flags, as a `--config` file is: read it, copy
it, change it. What it leaves out has the default.
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
    """`token`; `verifier=1,token=0.01`; in a TOML file also { verifier = 1, token = 0.01 }."""
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
            f"{said} has the weight {weight.strip()!r}, which is no number", "say verifier=1,token=0.01"
        ) from None


@dataclass(frozen=True)
class RLSettings(TrainingSettings):
    """What decides the outcome of an EM-RL run; the equations are in `emlocal.em`.

    Raises UsageError, with flag and range, for a bad value.
    """

    samples: int = setting(
        4, "--samples --num-generations --n", 2, 10**4, "N, answers to each prompt of a step.", panel=ANSWERS
    )
    reward: tuple[tuple[Reward, float], ...] = _reward(
        (("token", 1.0),),
        "--reward",
        help="token, sequence, self-certainty, majority, vote or verifier; or a weighted sum:"
        " verifier=1,token=0.01. (default: token)",
        metavar="NAME",
        read=_rewards,
    )
    """What an answer is worth: rewards and their weights in the sum."""
    normalize: RewardScale = _reward(
        "sum",
        "--normalize",
        help="Of the rewards token and sequence: the paper's sums, or the released code's means.",
    )
    advantage: Advantage = _reward("rloo", "--advantage", help="Of an answer against the others.")
    loss: Loss = _reward("reinforce", "--loss", help="Of the policy.")
    averaging: Averaging = _reward(
        "token", "--averaging", help="Mean over tokens; over answers of means; over answers of sums."
    )
    """Of the tokens' losses: see `emlocal.em.losses.averaging_weights`."""
    ppo_epochs: int = _reward(
        1, "--ppo-epochs --num-iterations", 1, 100, "Optimizer steps on the same answers."
    )
    clip_low: float = _reward(
        0.2,
        "--clip-low --epsilon",
        0,
        1,
        "ppo-clip holds tokens whose probability fell by more than this share …",
    )
    clip_high: float = _reward(0.2, "--clip-high --epsilon-high", 0, 1e3, "… or rose by more.")
    kl_beta: float = setting(
        0.001, "--kl-beta --beta", 0, 1e3, "β, weight of KL(model ‖ base), estimated by k3.", panel=TRAINING
    )
    entropy_bonus: float = _reward(
        0.0,
        "--entropy-bonus",
        -1e3,
        1e3,
        "c: rewards entropy with c·H a token. (The paper's code left 0.001 on; -1 adds EM-FT's gradient.)",
    )
    regularize: Regularize = _reward(
        "none", "--regularize", help="Hold back the tokens that lower entropy most."
    )
    clip_cov_share: float = _reward(
        2e-4, "--clip-cov-share", 0, 1, "Clip-Cov: share of tokens without policy gradient.", low_is_open=True
    )
    kl_cov_share: float = _reward(
        2e-3, "--kl-cov-share", 0, 1, "KL-Cov: share of tokens that are pulled back.", low_is_open=True
    )
    kl_cov_pull: float = _reward(1.0, "--kl-cov-pull", 0, 1e3, "KL-Cov: the strength of the pull.")
    token_weights: TokenWeights = _reward(
        "none", "--token-weights", help="Weigh tokens by how much answers disagree there."
    )
    tw_alpha: float = _reward(1.7, "--tw-alpha", 1, 100, "TW-GRPO: the largest weight of a token.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rewards(self.reward)
        if self.regularize == "kl-cov" and self.ppo_epochs == 1:
            raise UsageError(
                "--regularize kl-cov does nothing in the first step on new answers, and --ppo-epochs is 1",
                "take more: --ppo-epochs 2; or --regularize clip-cov",
            )
        if "majority" in dict(self.reward) and self.samples == 2:
            raise UsageError("the majority of two answers tells nothing", "take three: --samples 3")
        if self.regularize == "kl-cov" and self.loss != "ppo-clip":
            raise UsageError("--regularize kl-cov needs the ratio of ppo-clip", "say --loss ppo-clip")
        if self.ppo_epochs > 1 and self.loss != "ppo-clip":
            raise UsageError(
                f"--ppo-epochs is {self.ppo_epochs}; from the second update on the answers are an older"
                " model's, which takes the ratio of ppo-clip",
                "say --loss ppo-clip, or --ppo-epochs 1",
            )
        self._check_idle()

    def _check_idle(self) -> None:
        """Raise UsageError for a setting that was changed and that nothing looks at."""
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
                    f"{flag} is {vars(self)[name]}, and does nothing without {needed}", f"leave out {flag}"
                )

    @property
    def answers_per_step(self) -> int:
        return self.prompts_per_step * self.samples

    @property
    def needs_labels(self) -> bool:
        """Whether prompts must come with answers."""
        return "verifier" in dict(self.reward)

    @property
    def needs_scores(self) -> bool:
        """Whether the first update needs to know what the answers' own model says of their tokens."""
        of_tokens = {"token", "sequence", "self-certainty"} & dict(self.reward).keys()
        return bool(of_tokens) or self.loss == "ppo-clip" or self.regularize != "none"

    @property
    def needs_reference(self) -> bool:
        """Whether answers must be looked at by the base model: for the loss, or for the guard alone."""
        return self.kl_beta > 0 or self.max_kl > 0


def _check_rewards(rewards: tuple[tuple[str, float], ...]) -> None:
    names = [name for name, _ in rewards]
    for name in names:
        if name not in get_args(Reward):
            raise UsageError(f"--reward is {name!r}; it must be {' or '.join(get_args(Reward))}")
    if not names or len(set(names)) < len(names):
        raise UsageError("--reward names no reward, or one twice", "say --reward token")
    for name, weight in rewards:
        if not math.isfinite(weight) or weight == 0:
            raise UsageError(f"the weight of the reward {name} is {weight:g}; it must be a number, not 0")


def recipes() -> list[str]:
    """The names of the recipes that come with emlocal."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def read_recipe(name: str | Path) -> dict[str, Any]:
    """The settings of a recipe by name, or of a TOML file by path (ends in .toml): {field: value}.

    Raises UsageError for one that does not exist or cannot be read, and for settings that are unknown, of the
    wrong kind or out of range.
    """
    from emlocal.settings.resolve import read_settings

    if isinstance(name, str) and not name.endswith(".toml"):
        if name not in recipes():
            raise UsageError(f"there is no recipe {name}", f"take one of these: {', '.join(recipes())}")
        name = _RECIPES / f"{name}.toml"
    return read_settings(Path(name), Table.of(RLSettings))
