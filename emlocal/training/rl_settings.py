"""The numbers of an EM-RL run, each declared once, and the recipes. No numpy: `--help` reads this.

A recipe is a TOML file of settings under the names of their flags, as a `--config` file is: read it, copy
it, change it. What it leaves out has the default.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from emlocal.errors import UsageError
from emlocal.settings import setting, settings_of
from emlocal.training.settings import TrainingSettings, check_choice

Reward = Literal["token", "sequence", "self-certainty", "majority", "vote", "verifier"]
RewardScale = Literal["sum", "mean"]
Advantage = Literal["rloo", "grpo"]
Loss = Literal["reinforce", "ppo-clip"]
Averaging = Literal["token", "sequence", "sum"]
Regularize = Literal["none", "clip-cov", "kl-cov"]
TokenWeights = Literal["none", "tw-grpo"]

_CHOICES = {
    "normalize": get_args(RewardScale),
    "advantage": get_args(Advantage),
    "loss": get_args(Loss),
    "averaging": get_args(Averaging),
    "regularize": get_args(Regularize),
    "token_weights": get_args(TokenWeights),
}
_RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class RLSettings(TrainingSettings):
    """What decides the outcome of an EM-RL run; the equations are in `emlocal.em`.

    Raises UsageError, with flag and range, for a bad value.
    """

    samples: int = setting(4, "--samples", 2, 10**4, "N, answers to each prompt of a step.")
    reward: tuple[tuple[Reward, float], ...] = (("token", 1.0),)
    """What an answer is worth: rewards and their weights in the sum."""
    normalize: RewardScale = "sum"
    """Of the rewards token and sequence: the paper's sums over tokens, or the released code's means."""
    advantage: Advantage = "rloo"
    loss: Loss = "reinforce"
    averaging: Averaging = "token"
    """Of the tokens' losses: see `emlocal.em.policy_gradient.averaging_weights`."""
    ppo_epochs: int = setting(1, "--ppo-epochs", 1, 100, "Optimizer steps on the same answers.")
    clip_low: float = setting(
        0.2, "--clip-low", 0, 1, "ppo-clip holds tokens whose probability fell by more than this share …"
    )
    clip_high: float = setting(0.2, "--clip-high", 0, 1e3, "… or rose by more.")
    kl_beta: float = setting(0.001, "--kl-beta", 0, 1e3, "β, weight of KL(model ‖ base), estimated by k3.")
    entropy_bonus: float = setting(
        0.0,
        "--entropy-bonus",
        -1e3,
        1e3,
        "c: rewards entropy with c·H a token. (The paper's code left 0.001 on; -1 adds EM-FT's gradient.)",
    )
    regularize: Regularize = "none"
    clip_cov_share: float = setting(
        2e-4, "--clip-cov-share", 0, 1, "Clip-Cov: share of tokens without policy gradient.", low_is_open=True
    )
    kl_cov_share: float = setting(
        2e-3, "--kl-cov-share", 0, 1, "KL-Cov: share of tokens that are pulled back.", low_is_open=True
    )
    kl_cov_pull: float = setting(1.0, "--kl-cov-pull", 0, 1e3, "KL-Cov: the strength of the pull.")
    token_weights: TokenWeights = "none"  # noqa: S105 (tokens of text)
    tw_alpha: float = setting(1.7, "--tw-alpha", 1, 100, "TW-GRPO: the largest weight of a token.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in _CHOICES.items():
            check_choice(self, name, known)
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
        defaults = {f.name: f.default for f in fields(self)}
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
            if not used and vars(self)[name] != defaults[name]:
                flag = f"--{name.replace('_', '-')}"
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

    Raises UsageError for one that does not exist or cannot be read, and for settings that are unknown or
    of the wrong kind.
    """
    if isinstance(name, str) and not name.endswith(".toml"):
        if name not in recipes():
            raise UsageError(f"there is no recipe {name}", f"take one of these: {', '.join(recipes())}")
        name = _RECIPES / f"{name}.toml"
    path = Path(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}", "give a TOML file, or a recipe by its name") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as why:
        raise UsageError(f"{path} cannot be read: {why}") from why
    known = names_of_settings()
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise UsageError(f"{path}: unknown setting {key}", f"you may mean {near[0]}" if near else "")
    return {known[key]: _typed(f"{path}: {key}", known[key], value) for key, value in values.items()}


def names_of_settings() -> dict[str, str]:
    """{flag without its dashes: field}."""
    numbers = settings_of(RLSettings)
    flags = {f.name: numbers[f.name].flag if f.name in numbers else f"--{f.name}" for f in fields(RLSettings)}
    return {flag.removeprefix("--").replace("_", "-"): name for name, flag in flags.items()}


def _typed(where: str, name: str, value: Any) -> Any:
    """A value of a TOML file as RLSettings has it. Ranges are not looked at here."""
    if name == "reward":
        return _rewards(where, value)
    if name == "target_modules":
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return tuple(value)
        raise UsageError(f"{where} must be a list of names")
    default = next(f.default for f in fields(RLSettings) if f.name == name)
    assert default is not MISSING
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise UsageError(f"{where} is {value!r}; it must be like {default!r}")
    return value


def _rewards(where: str, value: Any) -> tuple[tuple[str, float], ...]:
    """`"token"` or `{ verifier = 1.0, token = 0.1 }`."""
    weights: Mapping[str, Any] = {value: 1.0} if isinstance(value, str) else value
    if not isinstance(weights, dict) or not all(type(w) in (int, float) for w in weights.values()):
        raise UsageError(f"{where} must be a name, or a table of names and weights")
    return tuple((name, float(weight)) for name, weight in weights.items())
