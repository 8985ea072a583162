"""The engines of a training run: one that is trained, and one that answers, which may be the same."""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

from emlocal import console
from emlocal.backends.base import LoadOptions
from emlocal.backends.engine import Opened
from emlocal.backends.engine import Trainer as EngineTrainer
from emlocal.backends.learner import Descent, Learner
from emlocal.backends.select import engine, select_backend
from emlocal.cli.training_options import AnswerOptions, MachineOptions, Rollouts, Trainer
from emlocal.errors import ContextFullError, ModelError, UsageError
from emlocal.generation.prompt import chat_tokens, with_system
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.machine import physical_cores
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.resolve import GGUFModel, Model, resolve
from emlocal.models.unpacked import identity, unpack
from emlocal.training.answerers import LlamaCppModel, SameModel
from emlocal.training.prompts import Prompt
from emlocal.training.settings import TrainingSettings
from emlocal.training.start import new_adapter
from emlocal.words import counted

L = TypeVar("L", bound=Learner)
MakeLearner = Callable[[Opened, Adapter, Descent, bool], L]
"""Takes the model, the adapter to begin with, and whether to compute activations twice."""

PARALLEL = 16
"""Answers at once, where nobody says."""
LONGEST_PROMPT = 1024
"""Tokens that are kept free for a prompt beside its answer, where the model's context has them."""


@dataclass
class Engines(Generic[L]):
    """What a run computes with."""

    model: Model
    settings: TrainingSettings
    trainer: str
    """torch or mlx."""
    threads: int
    place: str
    learner: L
    answerer: LlamaCppModel | SameModel
    quiet: bool = False

    @property
    def model_name(self) -> str:
        """As it was typed."""
        return self.model.name

    def describe(self) -> tuple[str, str, str]:
        """The model, what is trained, and what answers, for people."""
        name = Path(self.model.name).name if self.model.source == "path" else self.model.name
        layers = counted(len(self.learner.adapter().pairs), "layer")
        return (
            f"{name}, trained on {self.trainer}, {self.place}",
            f"LoRA of {self.learner.parameters:,} parameters in {layers}",
            f"answers by {self.answerer.backend.name}, {self.answerer.parallel} at once,"
            f" {counted(self.threads, 'thread')}",
        )

    def encoded(self, prompts: Sequence[Prompt], system: str | None) -> list[tuple[Prompt, list[int]]]:
        """The prompts and their tokens. Those that leave no room for an answer are left out, with a warning.

        Raises ContextFullError where that is all of them, UsageError where the template refuses one.
        """
        backend = self.answerer.backend
        room = self.settings.max_tokens
        fitting, most = [], backend.context - room
        too_long: list[tuple[Prompt, int]] = []
        for prompt, tokens in self._tokens(prompts, system):
            if len(tokens) > most:
                too_long.append((prompt, len(tokens)))
            else:
                fitting.append((prompt, tokens))
        if too_long:
            prompt, length = too_long[0]
            said = (
                f"{counted(len(too_long), 'prompt')} of {len(prompts):,} {_does(len(too_long))} not fit:"
                f" {prompt.where} has {length:,} tokens; --context {backend.context:,} less {room:,} for the"
                f" answer {_leaves(most)}"
            )
            if not fitting:
                raise ContextFullError(said, "shorten them, or give a larger --context")
            console.warn(f"{said}; left out")
        return fitting

    def _tokens(self, prompts: Sequence[Prompt], system: str | None) -> Iterator[tuple[Prompt, list[int]]]:
        """Of each prompt. A million takes minutes, so it says how far it is."""
        with console.progress(self.quiet) as progress:
            for i, prompt in enumerate(prompts):
                if i and i % 1000 == 0:
                    progress(f"encoding prompts: {i:,} of {len(prompts):,}", 0, None)
                try:
                    yield prompt, chat_tokens(self.answerer.backend, with_system(prompt.messages, system))
                except UsageError as why:
                    raise UsageError(f"{prompt.where}: {why.message}", why.hint) from why

    def use(self, adapter: Adapter) -> None:
        """Answer with this adapter from now on."""
        self.learner.put(adapter)
        self.answerer.refresh(adapter)

    def identity(self) -> dict[str, Any]:
        """What of the engines decides the outcome, bit for bit."""
        return {
            "model": {"name": self.model.header.name, "sha256": _identity(self.model)},
            "engines": {
                "device": self.place,
                "rollouts": self.answerer.backend.name,
                "parallel": self.answerer.parallel,
                "context": self.answerer.backend.context,
                "threads": self.threads,
            },
        }

    def versions(self) -> dict[str, str]:
        """Of the packages that compute."""
        both = self.trainer, self.answerer.backend.name
        names = dict.fromkeys(package for name in both for package in engine(name).distributions)
        return {"python": platform.python_version(), **{name: version(name) for name in names}}


@contextmanager
def open_engines(
    name: str | None,
    settings: TrainingSettings,
    answers: AnswerOptions,
    machine: MachineOptions,
    make_learner: MakeLearner[L],
    trainer: str,
    *,
    quiet: bool,
) -> Iterator[Engines[L]]:
    """Resolve and load the model, once for training and once for answering where that is faster.

    `trainer`: see `choose_trainer`. Raises ModelError for a model that cannot be trained.
    """
    _check_rollouts(answers.rollouts, trainer)
    with console.progress(quiet) as progress:
        model = resolve(name, formats=("safetensors", "gguf"), offline=machine.offline, progress=progress)
        context = _context(model, settings, machine.context)
        _check_model(model, answers.rollouts)
        folder = unpack(model, progress) if isinstance(model, GGUFModel) else model.path
        progress(f"loading {trainer}", 0, None)
        threads = machine.threads or physical_cores()
        opened = _trainer(trainer).open(
            folder, name=model.name, device=machine.device, dtype=machine.dtype, threads=threads
        )
    learner = make_learner(
        opened,
        replace(new_adapter(opened.linear_layers(), settings), base_model=model.name),
        Descent(settings.weight_decay, settings.max_grad_norm),
        machine.gradient_checkpointing,
    )
    parallel = min(answers.parallel or PARALLEL, settings.answers_per_step)
    options = LoadOptions(
        context=context,
        sequences=parallel + SPARE_SEQUENCES,
        shared=False,
        threads=threads,
    )
    answerer = _answerer(model, opened, options, answers.rollouts, parallel)
    try:
        yield Engines(model, settings, trainer, threads, opened.place.describe(), learner, answerer, quiet)
    finally:
        answerer.close()


def choose_trainer(asked: Trainer, known: Sequence[str]) -> str:
    """The engine that is trained, torch or mlx: what was asked for, or what fits this machine.

    `known`: those that the method can be trained on. Raises UsageError for another one, BackendError for one
    that is not installed.
    """
    if asked == "auto":
        chosen = "mlx" if "mlx" in known and select_backend()[0] == "mlx" else "torch"
    else:
        chosen = asked
    if chosen not in known:
        raise UsageError(f"this is not for the {chosen} engine yet", f"use --backend {known[0]}")
    select_backend(chosen)  # which says what to install where it is missing
    return chosen


def _trainer(name: str) -> EngineTrainer:
    """How this engine trains."""
    trainer = engine(name).trainer
    assert trainer is not None  # see `choose_trainer`
    return trainer


def _check_rollouts(asked: Rollouts, trainer: str) -> None:
    if asked not in ("auto", "llama.cpp", trainer):
        raise UsageError(
            f"--rollouts is {asked}, and {trainer} is trained: the answers are given by that or by llama.cpp",
            f"use --rollouts {trainer}, or leave it out",
        )


def _context(model: Model, settings: TrainingSettings, asked: int | None) -> int:
    """Tokens of a prompt and its answer. Raises UsageError where the answer alone would fill it."""
    wanted = settings.max_tokens + LONGEST_PROMPT
    trained = model.header.context_length or asked or wanted
    if asked is not None and asked > trained:
        raise UsageError(f"--context is {asked:,}; the model was trained on {trained:,}")
    context = asked or min(trained, wanted)
    if settings.max_tokens >= context:
        raise UsageError(
            f"--max-tokens is {settings.max_tokens:,}; the context of prompt and answer is {context:,}",
            "give a smaller --max-tokens",
        )
    return context


def _check_model(model: Model, rollouts: Rollouts) -> None:
    if model.header.chat_template is None:
        raise ModelError(f"{model.name} has no chat template, which prompts are put with", "use a chat model")
    if rollouts == "llama.cpp" and not isinstance(model, GGUFModel):
        raise UsageError(
            f"{model.name} is no GGUF model: llama.cpp cannot answer with it", "leave --rollouts out"
        )


def _does(n: int) -> str:
    return "does" if n == 1 else "do"


def _leaves(most: int) -> str:
    return f"leave {most:,}" if most > 0 else "leave none"


def _answerer(
    model: Model, opened: Opened, options: LoadOptions, asked: Rollouts, parallel: int
) -> LlamaCppModel | SameModel:
    """llama.cpp for GGUF models on CPUs, few of which compute bfloat16; else the model that is trained."""
    wanted = asked == "llama.cpp" or (asked == "auto" and opened.place.on_cpu)
    if wanted and isinstance(model, GGUFModel):
        from emlocal.backends.llama_cpp import LlamaCppBackend

        return LlamaCppModel(LlamaCppBackend(model, options), model.header, parallel)
    return SameModel(opened.backend(options), parallel)


def _identity(model: Model) -> str:
    """Of the weights."""
    if isinstance(model, GGUFModel):
        return identity(model.header)
    import hashlib

    digest = hashlib.sha256()
    for path in model.files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
