"""The settings of a fine-tuning run, each declared once, and the recipes. No numpy: `--help` reads this.

What a training run is besides its settings: with what, where, and what becomes of it. No numpy.
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
Schedule = Literal["constant", "linear", "cosine"]
S = TypeVar("S", bound="TrainingSettings")

TRAINING, LORA, ANSWERS, STOPPING = "Training", "Adapter", "Answers trained on", "Stopping by itself"
"""Parts of the help."""
_training, _lora = partial(setting, panel=TRAINING), partial(setting, panel=LORA)
_answers, _stopping = partial(setting, panel=ANSWERS), partial(setting, panel=STOPPING)
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, by the names that transformers gives them in most architectures."""


def _names(given: Any, said: str) -> tuple[str, ...]:
    """Names with commas, or a list of names."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{said} is {shown(given)}; it must be a list of names")
    found = tuple(name.strip() for text in texts for name in text.split(",") if name.strip())
    if not found or not all(text.strip() for text in texts):
        raise UsageError(f"{said} is empty", "name layers, such as q_proj,v_proj")
    return found


@dataclass(frozen=True)
class TrainingSettings:
    """What every method of training has. Raises UsageError, with flag and range, for a bad value."""

    steps: int = _training(12, "--steps --iters --max-steps", 1, 10**6, "Optimizer steps.")
    prompts_per_step: int = _training(
        16, "--prompts-per-step --batch-size", 1, 10**6, "Prompts answered in each step."
    )
    learning_rate: float = _training(
        1e-4, "--learning-rate --lr", 0, 1, "Of AdamW, at its highest.", low_is_open=True
    )
    warmup: int = _training(
        0, "--warmup --warmup-steps", 0, 10**6, "Steps in which the learning rate rises to its highest."
    )
    schedule: Schedule = _training(
        "constant", "--schedule --lr-scheduler-type", help="Of the learning rate after the warm-up."
    )
    """How the learning rate goes on after the warm-up: linear and cosine fall to 0."""
    weight_decay: float = _training(0.0, "--weight-decay", 0, 1, "Of AdamW.")
    max_grad_norm: float = _training(
        1.0, "--max-grad-norm", 0, math.inf, "Longer gradients are cut to this.", low_is_open=True
    )
    rank: int = _lora(16, "--rank --lora-rank --lora-r", 1, 1024, "Rank of the LoRA adapter.")
    alpha: float = _lora(
        32.0,
        "--alpha --lora-alpha",
        0,
        1e6,
        "LoRA's alpha: its change is scaled by alpha / rank.",
        low_is_open=True,
    )
    target_modules: tuple[str, ...] = _lora(
        LINEAR_LAYERS,
        "--target-modules --lora-target-modules",
        help=f"Layers adapted, with commas. (default: {','.join(LINEAR_LAYERS)})",
        metavar="NAMES",
        read=_names,
    )
    """The layers that are adapted, by the last part of their names."""
    rollout_temperature: float = _answers(
        1.0,
        "--rollout-temp --rollout-temperature",
        0,
        100,
        "Sampling temperature of the answers trained on.",
        low_is_open=True,
    )
    max_tokens: int = _answers(
        256,
        "--max-tokens --max-new-tokens --n-predict --max-completion-length",
        1,
        10**6,
        "An answer ends after this many tokens.",
    )
    seed: int = _training(0, "--seed", 0, 2**63 - 1, "Of the adapter, the order of prompts and the answers.")

    entropy_floor: float = _stopping(
        0.02,
        "--entropy-floor",
        0,
        100,
        "Stop when the answers' mean entropy (nats) falls below this.",
        unit="nats",
    )
    max_repetition: float = _stopping(
        0.2, "--max-repetition", 0, 1, "Stop when answers repeat themselves by this much more than at first."
    )
    max_length_change: float = _stopping(
        2.0, "--max-length-change", 1, math.inf, "Stop when answers get longer or shorter by this factor."
    )
    max_kl: float = _stopping(
        1.0,
        "--max-kl",
        0,
        math.inf,
        "Stop when the mean KL to the base (nats a token) passes this (0 = do not look).",
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

    normalize: Normalize = _training(
        "token", "--normalize", help="Mean over tokens, or the paper's sum over each answer."
    )
    """token: the mean over a step's tokens; sequence: the sum over each answer's, as the paper's eq. 2."""
    kl_beta: float = _training(
        1.5, "--kl-beta --beta", 0, 1e3, "β, weight of KL(model ‖ base) beside the entropy."
    )
    temperature: float = _training(
        1.0,
        "--loss-temp --loss-temperature",
        0,
        100,
        "Temperature of the distributions in the loss.",
        low_is_open=True,
        name="loss_temperature",
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


_answers, _machine = partial(setting, panel=ANSWERS), partial(setting, panel="Model and machine")
Rollouts = Literal["auto", "llama.cpp", "mlx", "torch"]
Trainer = Literal["auto", "torch", "mlx"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Tracker = Literal["trackio", "wandb", "tensorboard"]


@dataclass(frozen=True)
class AnswerOptions:
    """How the prompts are put, and which engine answers them."""

    system: str | None = _answers(
        None, "--system --system-prompt", help="System message of prompts without one.", metavar="TEXT"
    )
    limit: int | None = _answers(None, "--limit", 1, 10**12, "Use the first N prompts only.")
    rollouts: Rollouts = _answers("auto", "--rollouts", help="Engine that answers.")
    parallel: int | None = _answers(
        None, "--parallel --max-num-seqs", 1, 256, "Answers at once. (default: 16)"
    )


@dataclass(frozen=True)
class MachineOptions:
    """Where and in which format."""

    backend: Trainer = _machine("auto", "--backend", help="Engine that is trained.")
    device: str = _machine("auto", "--device", help="cpu, cuda, cuda:1 …, gpu for mlx.", metavar="NAME")
    dtype: Dtype = _machine("auto", "--dtype", help="Of the frozen weights.")
    threads: int | None = _machine(
        None, "-t --threads", 1, 4 * (os.cpu_count() or 1), "CPU threads. (default: physical cores)"
    )
    context: int | None = _machine(
        None,
        f"--context {CONTEXT_NAMES} --max-seq-length",
        16,
        10**9,
        "Tokens of a prompt and its answer; longer prompts are left out. (default: --max-tokens + 1024)",
        unit="tokens",
    )
    token_budget: int = _machine(
        2048, "--tokens-per-batch", 1, 10**9, "Most tokens trained on at a time: memory, not outcome."
    )
    gradient_checkpointing: bool = _machine(
        False,
        "--gradient-checkpointing --grad-checkpoint",
        help="Compute activations twice rather than keep them: less memory, a third slower.",
    )
    offline: bool = _machine(False, "--offline", help="Never use the network.")

    def go_offline_if_asked(self) -> None:
        """To be called before anything is imported that may ask the hub."""
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@dataclass(frozen=True)
class RunOptions:
    """What becomes of the run."""

    resume: bool = setting(False, "--resume", help="Go on with the run that the output folder holds.")
    save_every: int = setting(5, "--save-every --save-steps", 1, 10**9, "Steps between checkpoints.")
    validate: str | None = setting(
        None, "--validate", help='Prompts with "answer": accuracy before and after.', metavar="FILE"
    )
    report_to: Tracker | None = setting(None, "--report-to", help="Send the metrics there too.")
    dry_run: bool = setting(
        False, "--dry-run", help="Show settings, one example, memory and time; train nothing."
    )
    config: Path | None = setting(
        None, "--config", help="Settings from a TOML file, by flag name.", metavar="FILE"
    )
    quiet: bool = setting(False, "-q --quiet", help="Nothing on stderr but warnings and errors.")


@dataclass(frozen=True)
class Setup:
    """A run besides its settings. Raises UsageError for numbers out of range."""

    data: "Source"
    output: Path
    """Folder for the adapter, the metrics and the checkpoints."""
    model: str | None = None
    """As people name it; None: the starter model."""
    run: RunOptions = RunOptions()
    answers: AnswerOptions = AnswerOptions()
    machine: MachineOptions = MachineOptions()
    validation: "Source | None" = None
    """Prompts with answers, which `run.validate` names on the command line."""

    def __post_init__(self) -> None:
        for options in (self.run, self.answers, self.machine):
            check_settings(options)
