"""The settings of a fine-tuning run, each declared once, and the recipes. No numpy: `--help` reads this."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from emlocal.errors import UsageError
from emlocal.settings.table import (
    NOTHING,
    Given,
    Table,
    check_settings,
    options_of,
    records_of,
    setting,
    shown,
)

Normalize = Literal["token", "sequence"]
Schedule = Literal["constant", "linear", "cosine"]
S = TypeVar("S", bound="TrainingSettings")

TRAINING, LORA, ANSWERS, STOPPING = "Training", "Adapter", "Answers trained on", "Stopping by itself"
"""Parts of the help."""
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, by the names that transformers gives them in most architectures."""


def _names(given: Any, said: str) -> tuple[str, ...]:
    """Names with commas, or a list of names."""
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",") if name.strip()]
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise UsageError(f"{said} is {shown(given)}; it must be a list of names")
    if not given or not all(given):
        raise UsageError(f"{said} is empty", "name layers, such as q_proj,v_proj")
    return tuple(given)


@dataclass(frozen=True)
class TrainingSettings:
    """What every method of training has. Raises UsageError, with flag and range, for a bad value."""

    steps: int = setting(
        12,
        "--steps",
        1,
        10**6,
        "Optimizer steps.",
        aliases=("--iters", "--max-steps"),
        panel=TRAINING,
    )
    prompts_per_step: int = setting(
        16,
        "--prompts-per-step",
        1,
        10**6,
        "Prompts answered in each step.",
        aliases=("--batch-size",),
        panel=TRAINING,
    )
    learning_rate: float = setting(
        1e-4,
        "--learning-rate",
        0,
        1,
        "Of AdamW, at its highest.",
        low_is_open=True,
        aliases=("--lr",),
        panel=TRAINING,
    )
    warmup: int = setting(
        0,
        "--warmup",
        0,
        10**6,
        "Steps in which the learning rate rises to its highest.",
        aliases=("--warmup-steps",),
        panel=TRAINING,
    )
    schedule: Schedule = setting(
        "constant",
        "--schedule",
        help="Of the learning rate after the warm-up.",
        choices=get_args(Schedule),
        aliases=("--lr-scheduler-type",),
        panel=TRAINING,
    )
    """How the learning rate goes on after the warm-up: linear and cosine fall to 0."""
    weight_decay: float = setting(0.0, "--weight-decay", 0, 1, "Of AdamW.", panel=TRAINING)
    max_grad_norm: float = setting(
        1.0,
        "--max-grad-norm",
        0,
        math.inf,
        "Longer gradients are cut to this.",
        low_is_open=True,
        panel=TRAINING,
    )
    rank: int = setting(
        16,
        "--rank",
        1,
        1024,
        "Rank of the LoRA adapter.",
        aliases=("--lora-rank", "--lora-r"),
        panel=LORA,
    )
    alpha: float = setting(
        32.0,
        "--alpha",
        0,
        1e6,
        "LoRA's alpha: its change is scaled by alpha / rank.",
        low_is_open=True,
        aliases=("--lora-alpha",),
        panel=LORA,
    )
    target_modules: tuple[str, ...] = setting(
        LINEAR_LAYERS,
        "--target-modules",
        help=f"Layers adapted, with commas. (default: {','.join(LINEAR_LAYERS)})",
        kind="text",
        aliases=("--lora-target-modules",),
        metavar="NAMES",
        panel=LORA,
        read=_names,
    )
    """The layers that are adapted, by the last part of their names."""
    rollout_temperature: float = setting(
        1.0,
        "--rollout-temp",
        0,
        100,
        "Sampling temperature of the answers trained on.",
        low_is_open=True,
        aliases=("--rollout-temperature",),
        panel=ANSWERS,
    )
    max_tokens: int = setting(
        256,
        "--max-tokens",
        1,
        10**6,
        "An answer ends after this many tokens.",
        aliases=("--max-new-tokens", "--n-predict", "--max-completion-length"),
        panel=ANSWERS,
    )
    seed: int = setting(
        0,
        "--seed",
        0,
        2**63 - 1,
        "Of the adapter, the order of prompts and the answers.",
        panel=TRAINING,
    )

    entropy_floor: float = setting(
        0.02,
        "--entropy-floor",
        0,
        100,
        "Stop when the answers' mean entropy (nats) falls below this.",
        panel=STOPPING,
        unit="nats",
    )
    max_repetition: float = setting(
        0.2,
        "--max-repetition",
        0,
        1,
        "Stop when answers repeat themselves by this much more than at first.",
        panel=STOPPING,
    )
    max_length_change: float = setting(
        2.0,
        "--max-length-change",
        1,
        math.inf,
        "Stop when answers get longer or shorter by this factor.",
        panel=STOPPING,
    )
    max_kl: float = setting(
        1.0,
        "--max-kl",
        0,
        math.inf,
        "Stop when the mean KL to the base (nats a token) passes this (0 = do not look).",
        panel=STOPPING,
        unit="nats",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        _names(self.target_modules, "--target-modules")

    @property
    def answers_per_step(self) -> int:
        """How many answers a step has."""
        return self.prompts_per_step

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the step with this number, from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        share = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * share


@dataclass(frozen=True)
class FineTuneSettings(TrainingSettings):
    """What decides the outcome of an EM-FT run."""

    normalize: Normalize = setting(
        "token",
        "--normalize",
        help="Mean over tokens, or the paper's sum over each answer.",
        choices=get_args(Normalize),
        panel=TRAINING,
    )
    """token: the mean over a step's tokens; sequence: the sum over each answer's, as the paper's eq. 2."""
    kl_beta: float = setting(
        1.5,
        "--kl-beta",
        0,
        1e3,
        "β, weight of KL(model ‖ base) beside the entropy.",
        aliases=("--beta",),
        panel=TRAINING,
    )
    temperature: float = setting(
        1.0,
        "--loss-temp",
        0,
        100,
        "Temperature of the distributions in the loss.",
        low_is_open=True,
        aliases=("--loss-temperature",),
        name="loss_temperature",
        panel=TRAINING,
    )

    @property
    def measures_kl(self) -> bool:
        """Whether the KL to the base is computed: for the loss, or for the guard alone."""
        return self.kl_beta > 0 or self.max_kl > 0


def settings_of_run(
    cls: type[S], given: Given, config: Path | None = None, recipe: Mapping[str, Any] = NOTHING
) -> S:
    """The settings of a run: what was given, over a TOML file's settings, over a recipe's, over the defaults.

    Args:
        recipe: {field: value}.
        UsageError: a value is out of range, or two contradict each other.
    """
    from emlocal.settings.files import read_settings

    file = read_settings(config, Table.of(cls)) if config is not None else {}
    known = records_of(cls)
    named = {known[name].name: value for name, value in recipe.items()}
    return options_of(cls, ("flag", given), ("config", file), ("recipe", named))


@dataclass(frozen=True)
class Recipe:
    """Named settings."""

    summary: str
    values: dict[str, Any]


RECIPES: dict[str, Recipe] = {
    "default": Recipe("chosen on GSM8K's train questions; docs/results.md has the measurements", {}),
    # Paper §3.1 and appendix: 512 on-policy prompts a step, 40 steps, sum over tokens, no KL; lr 1e-6 is
    # given for full weights, and one answer a prompt.
    "paper": Recipe(
        "the paper's: 512 prompts a step, 40 steps, eq. 2 as it is written, no KL",
        {
            "prompts_per_step": 512,
            "steps": 40,
            "learning_rate": 1e-6,
            "normalize": "sequence",
            "kl_beta": 0.0,
            "max_tokens": 4096,
        },
    ),
    # Gao et al. 2025 (arXiv 2505.20282), train.py: temperature 0.5 in the loss and of the answers, AdamW
    # 2e-5, batches of 64, 10 steps the reported optimum.
    "one-shot": Recipe(
        "Gao et al.'s: one prompt, 64 answers a step, temperature 0.5 in the loss, 10 steps",
        {
            "prompts_per_step": 64,
            "steps": 10,
            "learning_rate": 2e-5,
            "kl_beta": 0.0,
            "temperature": 0.5,
            "rollout_temperature": 0.5,
        },
    ),
}
