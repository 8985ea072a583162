"""A small run with real engines: torch trains the tiny model, and llama.cpp answers with it."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emlocal.backends.base import LoadOptions
from emlocal.backends.learner import Descent, EntropyObjective
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.models.adapters import read_adapter
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.resolve import resolve
from emlocal.training.engines import LlamaCppModel, new_adapter
from emlocal.training.folder import RunFolder
from emlocal.training.loop import Method, Outcome, Plan, Run
from emlocal.training.rl import FineTune, PolicyGradient, objective_of
from emlocal.training.rl_settings import RLSettings
from emlocal.training.settings import FineTuneSettings, TrainingSettings
from tests.metrics import metrics, timeless
from tests.tiny_pair import ModelPair

if TYPE_CHECKING:
    from torch import nn

    from emlocal.backends.torch.learner import TorchLearner
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
LABELS = ["1"] * len(PROMPTS)


@dataclass
class Watched:
    """A watcher that records its events, and acts at the n-th one."""

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
    settings: TrainingSettings = SETTINGS,
    *,
    resume: bool = False,
    plan: Plan = Plan(token_budget=40, save_every=2),
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Run, Any]]:
    """Returns a run that has not begun, and the checkpoint to begin from."""
    import torch
    from transformers import AutoModelForCausalLM

    from emlocal.backends.torch.model import linear_layers

    torch.set_num_threads(1)
    verb = "rl" if isinstance(settings, RLSettings) else "finetune"
    folder, start = RunFolder.open(out, verb, {"settings": asdict(settings)}, resume=resume)
    model = AutoModelForCausalLM.from_pretrained(pair.folder, dtype=torch.float32)
    learner, method = _method(settings, model, new_adapter(linear_layers(model), settings))
    gguf = resolve(str(pair.gguf))
    backend = LlamaCppBackend(gguf, LoadOptions(context=64, sequences=5, shared=False, threads=1))
    answerer = LlamaCppModel(backend, gguf.header, 3)
    try:
        yield Run(settings, plan, PROMPTS, method, learner, answerer, folder, watcher, cancelled), start
    finally:
        answerer.close()
        folder.close()


def _method(
    settings: TrainingSettings, model: "nn.Module", adapter: Adapter
) -> "tuple[TorchLearner, Method]":
    from emlocal.backends.torch.learner import TorchEntropyLearner, TorchPolicyLearner

    if isinstance(settings, RLSettings):
        by_policy = TorchPolicyLearner(
            model, adapter, Descent(), objective_of(settings), temperature=settings.rollout_temperature
        )
        return by_policy, PolicyGradient(settings, by_policy, LABELS)
    assert isinstance(settings, FineTuneSettings)
    objective = EntropyObjective(settings.kl_beta, settings.measures_kl, settings.temperature)
    by_entropy = TorchEntropyLearner(model, adapter, Descent(), objective)
    return by_entropy, FineTune(settings, by_entropy)


def run(pair: ModelPair, out: Path, watcher: Watched, *args: Any, **more: Any) -> Outcome:
    """Runs from the beginning, or from the folder's checkpoint."""
    with prepared(pair, out, watcher, *args, **more) as (work, start):
        return work.run(start)


def assert_equal(one: Adapter, other: Adapter) -> None:
    """Asserts equality bit for bit."""
    assert one.pairs.keys() == other.pairs.keys()
    for name, pair in one.pairs.items():
        assert np.array_equal(pair.a, other.pairs[name].a), name
        assert np.array_equal(pair.b, other.pairs[name].b), name


def assert_same(out: Path, whole: Path) -> None:
    """Asserts that two runs left the same adapter and, apart from times, the same metrics."""
    assert_equal(read_adapter(out), read_adapter(whole))
    assert timeless(metrics(out)) == timeless(metrics(whole))


def kill_and_resume(pair: ModelPair, out: Path, settings: TrainingSettings, events: int) -> int:
    """Runs to the end with up to ten kills at random moments; returns the number of kills.

    They come while answering and training (before a number of the watcher's events), and around every write.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.runs", "torch", "transformers"])
    random = np.random.default_rng(0)
    for attempt in range(10):
        at = (int(random.integers(1, events)), -1) if attempt % 2 else (-1, int(random.integers(1, 16)))
        process = context.Process(target=_killed, args=(pair, out, settings, *at))
        process.start()
        process.join(300)
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            return attempt
    run(pair, out, Watched(), settings, resume=(out / "run.json").exists())
    return 10


def _killed(pair: ModelPair, out: Path, settings: TrainingSettings, event: int, syncs: int) -> None:
    """Resumes the run in its own process, and dies by SIGKILL at an event, or at a file's fsync."""

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
    run(pair, out, Watched(event, die), settings, resume=(out / "run.json").exists())
