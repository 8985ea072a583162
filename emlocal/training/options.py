"""What a training run is besides its settings: with what, where, and what becomes of it. No numpy."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from emlocal.settings.engine import CONTEXT_NAMES
from emlocal.settings.table import check_settings, setting
from emlocal.training.settings import ANSWERS

if TYPE_CHECKING:
    from emlocal.training.prompts import Source

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
