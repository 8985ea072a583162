"""The numbers of a fine-tuning run, each declared once, and the recipes. No numpy: `--help` reads this."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from emlocal.errors import UsageError
from emlocal.settings import check_settings, setting

Normalize = Literal["token", "sequence"]
Schedule = Literal["constant", "linear", "cosine"]

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, by the names that transformers gives them in most architectures."""


@dataclass(frozen=True)
class TrainingSettings:
    """What every method of training has. Raises UsageError, with flag and range, for a bad value."""

    steps: int = setting(12, "--steps", 1, 10**6, "Optimizer steps.")
    prompts_per_step: int = setting(16, "--prompts-per-step", 1, 10**6, "Prompts answered in each step.")
    learning_rate: float = setting(
        1e-4, "--learning-rate", 0, 1, "Of AdamW, at its highest.", low_is_open=True
    )
    warmup: int = setting(0, "--warmup", 0, 10**6, "Steps in which the learning rate rises to its highest.")
    schedule: Schedule = "constant"
    """How the learning rate goes on after the warm-up: linear and cosine fall to 0."""
    weight_decay: float = setting(0.0, "--weight-decay", 0, 1, "Of AdamW.")
    max_grad_norm: float = setting(
        1.0, "--max-grad-norm", 0, math.inf, "Longer gradients are cut to this.", low_is_open=True
    )
    rank: int = setting(16, "--rank", 1, 1024, "Rank of the LoRA adapter.")
    alpha: float = setting(
        32.0, "--alpha", 0, 1e6, "LoRA's alpha: its change is scaled by alpha / rank.", low_is_open=True
    )
    target_modules: tuple[str, ...] = LINEAR_LAYERS
    """The layers that are adapted, by the last part of their names."""
    rollout_temperature: float = setting(
        1.0, "--rollout-temp", 0, 100, "Sampling temperature of the answers trained on.", low_is_open=True
    )
    max_tokens: int = setting(256, "--max-tokens", 1, 10**6, "An answer ends after this many tokens.")
    seed: int = setting(0, "--seed", 0, 2**63 - 1, "Of the adapter, the order of prompts and the answers.")

    entropy_floor: float = setting(
        0.02, "--entropy-floor", 0, 100, "Stop when the answers' mean entropy (nats) falls below this."
    )
    max_repetition: float = setting(
        0.2, "--max-repetition", 0, 1, "Stop when answers repeat themselves by this much more than at first."
    )
    max_length_change: float = setting(
        2.0, "--max-length-change", 1, math.inf, "Stop when answers get longer or shorter by this factor."
    )
    max_kl: float = setting(
        1.0,
        "--max-kl",
        0,
        math.inf,
        "Stop when the mean KL to the base (nats a token) passes this (0 = do not look).",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        check_choice(self, "schedule", get_args(Schedule))
        if not self.target_modules or not all(self.target_modules):
            raise UsageError("--target-modules is empty", "name layers: --target-modules q_proj,v_proj")

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


def check_choice(settings: TrainingSettings, name: str, known: Sequence[str]) -> None:
    """Raise UsageError where a field, whose flag has its name, is none of these."""
    value = vars(settings)[name]
    if value not in known:
        flag = name.replace("_", "-")
        raise UsageError(f"--{flag} is {value!r}; it must be {' or '.join(known)}")


@dataclass(frozen=True)
class FineTuneSettings(TrainingSettings):
    """What decides the outcome of an EM-FT run."""

    normalize: Normalize = "token"
    """token: the mean over a step's tokens; sequence: the sum over each answer's, as the paper's eq. 2."""
    kl_beta: float = setting(1.5, "--kl-beta", 0, 1e3, "β, weight of KL(model ‖ base) beside the entropy.")
    temperature: float = setting(
        1.0, "--loss-temp", 0, 100, "Temperature of the distributions in the loss.", low_is_open=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "normalize", get_args(Normalize))

    @property
    def measures_kl(self) -> bool:
        """Whether the KL to the base is computed: for the loss, or for the guard alone."""
        return self.kl_beta > 0 or self.max_kl > 0


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
