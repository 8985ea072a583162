"""The flags that `emlocal finetune` and `emlocal rl` have in common."""

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from emlocal.cli.options import flag, number_flag
from emlocal.training.settings import LINEAR_LAYERS, TrainingSettings

TRAINING, LORA, ANSWERS, STOPPING, MACHINE = (
    "Training",
    "Adapter",
    "Answers trained on",
    "Stopping by itself",
    "Model and machine",
)


Data = Annotated[
    str,
    typer.Option(
        "--data", help="Prompts: .jsonl, text (one a line), or a dataset of the hub.", metavar="FILE"
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", help="Folder for the adapter, the metrics and the checkpoints.", metavar="FOLDER"
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "-m", "--model", help="Short name, .gguf file, folder, or org/name of the hub.", metavar="MODEL"
    ),
]


class Rollouts(StrEnum):
    auto = "auto"
    torch = "torch"
    mlx = "mlx"
    llama_cpp = "llama.cpp"


class Trainer(StrEnum):
    auto = "auto"
    torch = "torch"
    mlx = "mlx"


class ScheduleChoice(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Tracker(StrEnum):
    trackio = "trackio"
    wandb = "wandb"
    tensorboard = "tensorboard"


def _setting(name: str, panel: str, metavar: str = "X") -> Any:
    return number_flag(TrainingSettings, name, panel, metavar)


@dataclass(frozen=True)
class CommonOptions:
    """What decides the outcome; see TrainingSettings. None: as the recipe says."""

    steps: Annotated[int | None, _setting("steps", TRAINING, "N")] = None
    prompts_per_step: Annotated[int | None, _setting("prompts_per_step", TRAINING, "N")] = None
    learning_rate: Annotated[float | None, _setting("learning_rate", TRAINING)] = None
    warmup: Annotated[int | None, _setting("warmup", TRAINING, "N")] = None
    schedule: Annotated[
        ScheduleChoice | None,
        flag(TRAINING, "--schedule", help="Of the learning rate after the warm-up. (default: constant)"),
    ] = None
    weight_decay: Annotated[float | None, _setting("weight_decay", TRAINING)] = None
    max_grad_norm: Annotated[float | None, _setting("max_grad_norm", TRAINING)] = None
    seed: Annotated[int | None, _setting("seed", TRAINING, "N")] = None
    rank: Annotated[int | None, _setting("rank", LORA, "N")] = None
    alpha: Annotated[float | None, _setting("alpha", LORA)] = None
    target_modules: Annotated[
        str | None,
        flag(
            LORA,
            "--target-modules",
            help=f"Layers adapted, with commas. (default: {','.join(LINEAR_LAYERS)})",
            metavar="NAMES",
        ),
    ] = None
    rollout_temperature: Annotated[float | None, _setting("rollout_temperature", ANSWERS)] = None
    max_tokens: Annotated[int | None, _setting("max_tokens", ANSWERS, "N")] = None
    entropy_floor: Annotated[float | None, _setting("entropy_floor", STOPPING)] = None
    max_repetition: Annotated[float | None, _setting("max_repetition", STOPPING)] = None
    max_length_change: Annotated[float | None, _setting("max_length_change", STOPPING)] = None
    max_kl: Annotated[float | None, _setting("max_kl", STOPPING)] = None


@dataclass(frozen=True)
class AnswerOptions:
    """How the prompts are put, and which engine answers them."""

    system: Annotated[
        str | None, flag(ANSWERS, "--system", help="System message of prompts without one.", metavar="TEXT")
    ] = None
    limit: Annotated[
        int | None, flag(ANSWERS, "--limit", help="Use the first N prompts only.", metavar="N")
    ] = None
    rollouts: Annotated[
        Rollouts, flag(ANSWERS, "--rollouts", help="Engine that answers. (default: auto)")
    ] = Rollouts.auto
    parallel: Annotated[
        int | None, flag(ANSWERS, "--parallel", help="Answers at once. (default: 16)", metavar="N")
    ] = None


@dataclass(frozen=True)
class MachineOptions:
    """Where and in which format."""

    backend: Annotated[
        Trainer, flag(MACHINE, "--backend", help="Engine that is trained. (default: auto)")
    ] = Trainer.auto
    device: Annotated[
        str,
        flag(MACHINE, "--device", help="cpu, cuda, cuda:1 …, gpu for mlx. (default: auto)", metavar="NAME"),
    ] = "auto"
    dtype: Annotated[Dtype, flag(MACHINE, "--dtype", help="Of the frozen weights. (default: auto)")] = (
        Dtype.auto
    )
    threads: Annotated[
        int | None,
        flag(MACHINE, "-t", "--threads", help="CPU threads. (default: physical cores)", metavar="N"),
    ] = None
    context: Annotated[
        int | None,
        flag(
            MACHINE,
            "--context",
            help="Tokens of a prompt and its answer; longer prompts are left out."
            " (default: --max-tokens + 1024)",
            metavar="N",
        ),
    ] = None
    token_budget: Annotated[
        int,
        flag(
            MACHINE,
            "--tokens-per-batch",
            help="Most tokens trained on at a time: memory, not outcome. (default: 2048)",
            metavar="N",
        ),
    ] = 2048
    gradient_checkpointing: Annotated[
        bool,
        flag(
            MACHINE,
            "--gradient-checkpointing",
            help="Compute activations twice rather than keep them: less memory, a third slower.",
        ),
    ] = False
    offline: Annotated[bool, flag(MACHINE, "--offline", help="Never use the network.")] = False

    def go_offline_if_asked(self) -> None:
        """To be called before anything is imported that may ask the hub."""
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@dataclass(frozen=True)
class RunOptions:
    """What becomes of the run."""

    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that the output folder holds.")
    ] = False
    save_every: Annotated[
        int,
        typer.Option(
            "--save-every", help="Steps between checkpoints. (default: 5)", metavar="N", show_default=False
        ),
    ] = 5
    validate: Annotated[
        str | None,
        typer.Option("--validate", help='Prompts with "answer": accuracy before and after.', metavar="FILE"),
    ] = None
    report_to: Annotated[Tracker | None, typer.Option("--report-to", help="Send the metrics there too.")] = (
        None
    )
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show settings, one example, memory and time; train nothing."),
    ] = False
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Settings from a TOML file, by flag name.", metavar="FILE"),
    ] = None
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Nothing on stderr but warnings and errors.")
    ] = False
