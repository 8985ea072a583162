"""The settings of a fine-tuning run, each declared once, and its recipes.

Also the rest of a training run's setup: model, machine and output. This module imports no numpy, because
`--help` needs it.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from emlocal.errors import UsageError
from emlocal.settings.options import CONTEXT_NAMES
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

if TYPE_CHECKING:
    from emlocal.training.prompts import Source

Normalize = Literal["token", "sequence"]
Learn = Literal["entropy", "vote"]
Schedule = Literal["constant", "linear", "cosine"]
S = TypeVar("S", bound="TrainingSettings")

TRAINING, LORA, ANSWERS, STOPPING = "Training", "Adapter", "Answers trained on", "Stopping by itself"
"""Sections of the help."""
_training, _lora = partial(setting, panel=TRAINING), partial(setting, panel=LORA)
_answers, _stopping = partial(setting, panel=ANSWERS), partial(setting, panel=STOPPING)
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a block, by their transformers names in most architectures."""


def _names(given: Any, said: str) -> tuple[str, ...]:
    """Parses a comma-separated text, or a list, of names."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{said} is {shown(given)}; it must be a list of names")
    found = tuple(name.strip() for text in texts for name in text.split(",") if name.strip())
    if not found or not all(text.strip() for text in texts):
        raise UsageError(f"{said} is empty", "name layers, for example q_proj,v_proj")
    return found


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of all training methods. Raises UsageError, with flag and range, for a bad value."""

    steps: int = _training(12, "--steps --iters --max-steps", 1, 10**6, "Take this many optimiser steps.")
    prompts_per_step: int = _training(
        16, "--prompts-per-step --batch-size", 1, 10**6, "Set the number of prompts answered in each step."
    )
    learning_rate: float = _training(
        1e-4, "--learning-rate --lr", 0, 1, "Set AdamW's peak learning rate.", low_is_open=True
    )
    warmup: int = _training(
        0,
        "--warmup --warmup-steps",
        0,
        10**6,
        "Set the number of steps in which the learning rate rises to its peak.",
    )
    schedule: Schedule = _training(
        "constant",
        "--schedule --lr-scheduler-type",
        help="Set how the learning rate falls after the warm-up.",
    )
    """Course of the learning rate after the warm-up: constant, or linear or cosine down to 0."""
    weight_decay: float = _training(0.0, "--weight-decay", 0, 1, "Set AdamW's weight decay.")
    max_grad_norm: float = _training(
        1.0, "--max-grad-norm", 0, math.inf, "Scale gradients down to this norm.", low_is_open=True
    )
    rank: int = _lora(16, "--rank --lora-rank --lora-r", 1, 1024, "Set the rank of the LoRA adapter.")
    alpha: float = _lora(
        32.0,
        "--alpha --lora-alpha",
        0,
        1e6,
        "Scale the LoRA adapter by alpha / rank.",
        low_is_open=True,
    )
    target_modules: tuple[str, ...] = _lora(
        LINEAR_LAYERS,
        "--target-modules --lora-target-modules",
        help=f"Adapt these layers, separated by commas. (default: {','.join(LINEAR_LAYERS)})",
        metavar="NAMES",
        read=_names,
    )
    """The adapted layers, by the last part of their names."""
    rollout_temperature: float = _answers(
        1.0,
        "--rollout-temp --rollout-temperature",
        0,
        100,
        "Set the sampling temperature of the answers.",
        low_is_open=True,
    )
    max_tokens: int = _answers(
        256,
        "--max-tokens --max-new-tokens --n-predict --max-completion-length",
        1,
        10**6,
        "Stop each answer after this many tokens.",
    )
    seed: int = _training(
        0, "--seed", 0, 2**63 - 1, "Set the seed of the adapter, the prompts' order and the answers."
    )

    entropy_floor: float = _stopping(
        0.02,
        "--entropy-floor",
        0,
        100,
        "Stop when the answers' mean entropy falls below this, in nats.",
        unit="nats",
    )
    max_repetition: float = _stopping(
        0.2, "--max-repetition", 0, 1, "Stop when the repeated share of the answers' text grows by this."
    )
    max_length_change: float = _stopping(
        2.0, "--max-length-change", 1, math.inf, "Stop when the answers get longer or shorter by this factor."
    )
    max_kl: float = _stopping(
        1.0,
        "--max-kl",
        0,
        math.inf,
        "Stop when the mean KL to the base exceeds this, in nats per token (0 = off).",
        unit="nats",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        _names(self.target_modules, "--target-modules")

    @property
    def answers_per_step(self) -> int:
        """Number of answers in a step."""
        return self.prompts_per_step

    def learning_rate_at(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        share = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * share


@dataclass(frozen=True)
class FineTuneSettings(TrainingSettings):
    """The settings that determine the outcome of an EM-FT run."""

    learn: Learn = _training(
        "entropy",
        "--learn",
        help="Lower the entropy of the model's answers, or learn those that win a vote among its samples.",
    )
    samples: int = _answers(
        8, "--samples --num-generations --n", 2, 1024, "Set the number of answers that vote on each prompt."
    )
    margin: float = _answers(
        0.5,
        "--margin",
        0,
        1,
        "Learn from a vote if its first answer leads the second by this share of the samples.",
    )
    normalize: Normalize = _training(
        "token",
        "--normalize",
        help="Average the loss over tokens, or sum it over each answer as the paper does.",
    )
    """token: mean over a step's tokens; sequence: sum over each answer's tokens, as in the paper's eq. 2."""
    kl_beta: float = _training(
        1.5, "--kl-beta --beta", 0, 1e3, "Set the weight of KL(model ‖ base) in the loss (β)."
    )
    temperature: float = _training(
        1.0,
        "--loss-temp --loss-temperature",
        0,
        100,
        "Set the temperature of the distributions in the loss.",
        low_is_open=True,
        name="loss_temperature",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        voting = self.learn == "vote"
        for name, used in (("samples", voting), ("margin", voting), ("temperature", not voting)):
            record = records_of(FineTuneSettings)[name]
            if not used and vars(self)[name] != record.default:
                needed = "--learn vote" if name != "temperature" else "--learn entropy"
                raise UsageError(
                    f"{record.flag} is {vars(self)[name]}, which has no effect without {needed}",
                    f"leave out {record.flag}",
                )

    @property
    def measures_kl(self) -> bool:
        """Whether the KL to the base is computed, for the loss or only for the guard."""
        return self.kl_beta > 0 or self.max_kl > 0


def settings_of_run(
    cls: type[S], given: Given, config: Path | None = None, recipe: Mapping[str, Any] = NOTHING
) -> S:
    """Resolves the settings of a run: given values, then a TOML file's, then a recipe's, then the defaults.

    Args:
        recipe: {field: value}.
    Raises:
        UsageError: a value is out of range, or two contradict each other.
    """
    from emlocal.settings.resolve import read_settings

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
    # Paper §3.1 and appendix: 512 on-policy prompts a step, 40 steps, sum over tokens, no KL. Its learning
    # rate of 1e-6 is for full weights, with one answer a prompt.
    "paper": Recipe(
        "the paper's: 512 prompts per step, 40 steps, its eq. 2, no KL",
        {
            "prompts_per_step": 512,
            "steps": 40,
            "learning_rate": 1e-6,
            "normalize": "sequence",
            "kl_beta": 0.0,
            "max_tokens": 4096,
        },
    ),
    # Gao et al. 2025 (arXiv 2505.20282), train.py: temperature 0.5 for the loss and the answers, AdamW 2e-5,
    # batches of 64; 10 steps are the reported optimum.
    "one-shot": Recipe(
        "Gao et al.'s: one prompt, 64 answers per step, temperature 0.5 in the loss, 10 steps",
        {
            "prompts_per_step": 64,
            "steps": 10,
            "learning_rate": 2e-5,
            "kl_beta": 0.0,
            "temperature": 0.5,
            "rollout_temperature": 0.5,
        },
    ),
    # The samples are drawn like those of the method `vote`. β weighs the texts' k3, not the exact KL.
    "vote": Recipe(
        "answers that win a vote of 8 samples by half of them, the clearest first",
        {"learn": "vote", "rollout_temperature": 0.7, "kl_beta": 0.1, "max_tokens": 400},
    ),
}


_answers, _machine = partial(setting, panel=ANSWERS), partial(setting, panel="Model and machine")
Rollouts = Literal["auto", "llama.cpp", "mlx", "torch"]
Trainer = Literal["auto", "torch", "mlx"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Tracker = Literal["trackio", "wandb", "tensorboard"]


@dataclass(frozen=True)
class AnswerOptions:
    """How prompts are formatted, and which engine answers them."""

    system: str | None = _answers(
        None,
        "--system --system-prompt",
        help="Set the system message of prompts without one.",
        metavar="TEXT",
    )
    limit: int | None = _answers(None, "--limit", 1, 10**12, "Use only the first N prompts.")
    rollouts: Rollouts = _answers("auto", "--rollouts", help="Choose the engine that answers the prompts.")
    parallel: int | None = _answers(
        None, "--parallel --max-num-seqs", 1, 256, "Set the number of answers at once. (default: 16)"
    )


@dataclass(frozen=True)
class MachineOptions:
    """Engine, device, number format and memory of a run."""

    backend: Trainer = _machine("auto", "--backend", help="Choose the engine that trains.")
    device: str = _machine(
        "auto", "--device", help="Choose the device: cpu, cuda, cuda:1 …, or gpu for mlx.", metavar="NAME"
    )
    dtype: Dtype = _machine("auto", "--dtype", help="Set the number format of the frozen weights.")
    threads: int | None = _machine(
        None,
        "-t --threads",
        1,
        4 * (os.cpu_count() or 1),
        "Set the number of CPU threads. (default: physical cores)",
    )
    context: int | None = _machine(
        None,
        f"--context {CONTEXT_NAMES} --max-seq-length",
        16,
        10**9,
        "Set the length of prompt and answer; longer prompts are left out. (default: --max-tokens + 1024)",
        unit="tokens",
    )
    token_budget: int = _machine(
        2048,
        "--tokens-per-batch",
        1,
        10**9,
        "Train on at most this many tokens at once; changes memory, not results.",
    )
    gradient_checkpointing: bool = _machine(
        False,
        "--gradient-checkpointing --grad-checkpoint",
        help="Recompute activations to save memory; about a third slower.",
    )
    offline: bool = _machine(False, "--offline", help="Never use the network.")

    def go_offline_if_asked(self) -> None:
        """Sets the hub's offline variables. Call it before importing anything that may use the hub."""
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@dataclass(frozen=True)
class RunOptions:
    """Resuming, checkpoints and reports of a run."""

    resume: bool = setting(False, "--resume", help="Resume the run in the output folder.")
    save_every: int = setting(5, "--save-every --save-steps", 1, 10**9, "Save a checkpoint every N steps.")
    validate: str | None = setting(
        None, "--validate", help='Measure accuracy before and after on prompts with "answer".', metavar="FILE"
    )
    report_to: Tracker | None = setting(None, "--report-to", help="Also send the metrics to this tracker.")
    dry_run: bool = setting(
        False, "--dry-run", help="Show settings, an example, memory and time; train nothing."
    )
    config: Path | None = setting(
        None, "--config", help="Read settings from this TOML file; its keys are flag names.", metavar="FILE"
    )
    quiet: bool = setting(False, "-q --quiet", help="Print nothing but warnings and errors on stderr.")


@dataclass(frozen=True)
class Setup:
    """A run without its training settings. Raises UsageError for numbers out of range."""

    data: "Source"
    output: Path
    """Folder for the adapter, the metrics and the checkpoints."""
    model: str | None = None
    """The model's name; None: the starter model."""
    run: RunOptions = RunOptions()
    answers: AnswerOptions = AnswerOptions()
    machine: MachineOptions = MachineOptions()
    validation: "Source | None" = None
    """Prompts with answers; `run.validate` names them on the command line."""

    def __post_init__(self) -> None:
        for options in (self.run, self.answers, self.machine):
            check_settings(options)
