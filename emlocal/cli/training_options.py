"""The options that `emlocal finetune` and `emlocal rl` have beside their settings."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from emlocal.settings.engine import CONTEXT_NAMES
from emlocal.settings.table import setting
from emlocal.training.settings import ANSWERS

MACHINE = "Model and machine"
Rollouts = Literal["auto", "llama.cpp", "mlx", "torch"]
Trainer = Literal["auto", "torch", "mlx"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Tracker = Literal["trackio", "wandb", "tensorboard"]


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


@dataclass(frozen=True)
class AnswerOptions:
    """How the prompts are put, and which engine answers them."""

    system: str | None = setting(
        None,
        "--system",
        help="System message of prompts without one.",
        kind="text",
        aliases=("--system-prompt",),
        metavar="TEXT",
        panel=ANSWERS,
    )
    limit: int | None = setting(
        None, "--limit", 1, 10**12, "Use the first N prompts only.", kind="whole", panel=ANSWERS
    )
    rollouts: Rollouts = setting(
        "auto", "--rollouts", help="Engine that answers.", choices=get_args(Rollouts), panel=ANSWERS
    )
    parallel: int | None = setting(
        None,
        "--parallel",
        1,
        256,
        "Answers at once. (default: 16)",
        kind="whole",
        aliases=("--max-num-seqs",),
        panel=ANSWERS,
    )


@dataclass(frozen=True)
class MachineOptions:
    """Where and in which format."""

    backend: Trainer = setting(
        "auto", "--backend", help="Engine that is trained.", choices=get_args(Trainer), panel=MACHINE
    )
    device: str = setting(
        "auto", "--device", help="cpu, cuda, cuda:1 …, gpu for mlx.", metavar="NAME", panel=MACHINE
    )
    dtype: Dtype = setting(
        "auto", "--dtype", help="Of the frozen weights.", choices=get_args(Dtype), panel=MACHINE
    )
    threads: int | None = setting(
        None,
        "--threads",
        1,
        4 * (os.cpu_count() or 1),
        "CPU threads. (default: physical cores)",
        kind="whole",
        short="-t",
        panel=MACHINE,
    )
    context: int | None = setting(
        None,
        "--context",
        16,
        10**9,
        "Tokens of a prompt and its answer; longer prompts are left out. (default: --max-tokens + 1024)",
        kind="whole",
        aliases=(*CONTEXT_NAMES, "--max-seq-length"),
        panel=MACHINE,
        unit="tokens",
    )
    token_budget: int = setting(
        2048,
        "--tokens-per-batch",
        1,
        10**9,
        "Most tokens trained on at a time: memory, not outcome.",
        panel=MACHINE,
    )
    gradient_checkpointing: bool = setting(
        False,
        "--gradient-checkpointing",
        help="Compute activations twice rather than keep them: less memory, a third slower.",
        aliases=("--grad-checkpoint",),
        panel=MACHINE,
    )
    offline: bool = setting(False, "--offline", help="Never use the network.", panel=MACHINE)

    def go_offline_if_asked(self) -> None:
        """To be called before anything is imported that may ask the hub."""
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@dataclass(frozen=True)
class RunOptions:
    """What becomes of the run."""

    resume: bool = setting(False, "--resume", help="Go on with the run that the output folder holds.")
    save_every: int = setting(
        5, "--save-every", 1, 10**9, "Steps between checkpoints.", aliases=("--save-steps",)
    )
    validate: str | None = setting(
        None,
        "--validate",
        help='Prompts with "answer": accuracy before and after.',
        kind="text",
        metavar="FILE",
    )
    report_to: Tracker | None = setting(
        None, "--report-to", help="Send the metrics there too.", choices=get_args(Tracker)
    )
    dry_run: bool = setting(
        False, "--dry-run", help="Show settings, one example, memory and time; train nothing."
    )
    config: Path | None = setting(
        None, "--config", help="Settings from a TOML file, by flag name.", kind="path", metavar="FILE"
    )
    quiet: bool = setting(False, "--quiet", help="Nothing on stderr but warnings and errors.", short="-q")
