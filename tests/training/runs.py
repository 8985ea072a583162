"""A small run with real engines: torch trains the tiny model, llama.cpp or torch answers with it."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emlocal.backends.base import LoadOptions
from emlocal.backends.learner import Descent, EntropyObjective
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.models.resolve import resolve
from emlocal.training.answerers import LlamaCppModel
from emlocal.training.finetune import FineTune
from emlocal.training.folder import RunFolder
from emlocal.training.loop import Outcome, Plan, Run
from emlocal.training.settings import FineTuneSettings
from emlocal.training.start import new_adapter
from tests.tiny_pair import ModelPair

SETTINGS = FineTuneSettings(
    steps=6,
    prompts_per_step=4,
    learning_rate=3e-3,
    rank=4,
    alpha=8,
    kl_beta=0.5,
    max_tokens=12,
    entropy_floor=0,
    max_repetition=1,
    max_length_change=1e9,
    max_kl=1e9,
)
PROMPTS = [[5 + i, 9, 10 + i, 11] for i in range(10)]


@dataclass
class Watched:
    """A watcher that remembers, and does something at the n-th event."""

    at: int = -1
    act: Callable[[], None] = lambda: None
    events: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def happened(self) -> None:
        self.events += 1
        if self.events == self.at:
            self.act()

    def answering(self, step: int, done: int, total: int) -> None:
        self.happened()

    def training(self, step: int, done: int, total: int) -> None:
        self.happened()

    def finished_step(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.happened()

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@contextmanager
def prepared(
    pair: ModelPair,
    out: Path,
    watcher: Watched,
    settings: FineTuneSettings = SETTINGS,
    *,
    resume: bool = False,
    plan: Plan = Plan(token_budget=40, save_every=2),
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Run, Any]]:
    """A run that has not begun, and the checkpoint to begin from."""
    import torch
    from transformers import AutoModelForCausalLM

    from emlocal.backends.torch.entropy_learner import TorchEntropyLearner
    from emlocal.backends.torch.learner import linear_layers

    torch.set_num_threads(1)
    folder, start = RunFolder.open(out, "finetune", {"settings": asdict(settings)}, resume=resume)
    model = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32)
    adapter = new_adapter(linear_layers(model), settings)
    objective = EntropyObjective(settings.kl_beta, settings.measures_kl, settings.temperature)
    learner = TorchEntropyLearner(model, adapter, Descent(), objective)
    gguf = resolve(str(pair.gguf))
    backend = LlamaCppBackend(gguf, LoadOptions(context=64, sequences=5, shared=False, threads=1))
    answerer = LlamaCppModel(backend, gguf.header, 3)
    try:
        method = FineTune(settings, learner)
        yield Run(settings, plan, PROMPTS, method, learner, answerer, folder, watcher, cancelled), start
    finally:
        answerer.close()
        folder.close()


def run(pair: ModelPair, out: Path, watcher: Watched, *args: Any, **more: Any) -> Outcome:
    """From the beginning, or on from what the folder holds."""
    with prepared(pair, out, watcher, *args, **more) as (work, start):
        return work.run(start)


def killed(pair: ModelPair, out: Path, event: int, syncs: int) -> None:
    """For a process of its own: go on with the run, and die by SIGKILL at an event, or at a file's fsync."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    real, count = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == syncs:
            die()
        real(descriptor)

    os.fsync = fsync
    run(pair, out, Watched(event, die), resume=(out / "run.json").exists())
