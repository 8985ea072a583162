"""The engines of a training run: one is trained and one answers; both may be the same."""

import math
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from emlocal.backends import ENGINES
from emlocal.backends.base import Backend, LoadOptions
from emlocal.backends.engine import Opened, Trainer, Training, engine, select_backend
from emlocal.backends.learner import Descent, Learner
from emlocal.errors import ContextFullError, UsageError
from emlocal.generation.prompt import chat_tokens, check_template, once, with_system
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.identity import weights_digest
from emlocal.machine import physical_cores
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.models.adapters.gguf_lora import write_gguf
from emlocal.models.gguf.header import GGUFHeader
from emlocal.models.resolve import GGUFModel, Model, resolve
from emlocal.models.unpacked import check_runs, unpack
from emlocal.sampling.draw import request_key
from emlocal.text import counted
from emlocal.training.folder import Verb, View
from emlocal.training.loop import Method
from emlocal.training.prompts import Prompt
from emlocal.training.settings import Setup, TrainingSettings

if TYPE_CHECKING:
    from emlocal.backends.llama_cpp import LlamaCppBackend

L = TypeVar("L", bound=Learner)
MakeLearner = Callable[[Opened, Adapter, Descent, bool], L]
"""Receives the model, the initial adapter, the optimizer's settings, and whether to recompute activations."""

PARALLEL = 16
"""Default number of answers at once."""
LONGEST_PROMPT = 1024
"""Tokens reserved for a prompt beside its answer, if the model's context is large enough."""


@dataclass(frozen=True)
class Objective(Generic[L]):
    """The settings and the method of a run."""

    verb: Verb
    settings: TrainingSettings
    check: Callable[[Sequence[Prompt]], None]
    """Raises UsageError for prompts that the method cannot use."""
    make_learner: MakeLearner[L]
    make_method: Callable[[L, Sequence[Prompt]], Method]
    """Receives the prompts that fit."""
    told: Callable[[int], Sequence[str]]
    """Describes the settings in lines for people; receives the number of prompts."""
    training: Training
    """The kind of training that the engine must support."""


class SameModel:
    """Answers with the model that is being trained, so its adapter is always the newest."""

    def __init__(self, backend: Backend, parallel: int) -> None:
        self.backend = backend
        self.parallel = parallel

    def refresh(self, adapter: Adapter) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Frees the engine."""
        self.backend.close()


class LlamaCppModel:
    """Answers with the GGUF file in llama.cpp, which gets the new adapter at each step.

    This is faster than torch on CPUs without native bfloat16 (docs/performance.md). Its weights are those
    that are trained. Its activations are rounded more, so the answers come from nearly the same model.
    """

    def __init__(self, backend: "LlamaCppBackend", header: GGUFHeader, parallel: int) -> None:
        self.backend = backend
        self.parallel = parallel
        self._header = header
        self._folder = tempfile.TemporaryDirectory(prefix="emlocal-")

    def refresh(self, adapter: Adapter) -> None:
        """Uses this adapter from now on."""
        path = Path(self._folder.name) / "adapter.gguf"
        write_gguf(adapter, path, self._header)
        self.backend.set_adapters([(path, 1.0)])

    def close(self) -> None:
        """Frees the engine."""
        self.backend.close()
        self._folder.cleanup()


@dataclass
class Engines(Generic[L]):
    """The model and the engines of a run."""

    model: Model
    settings: TrainingSettings
    trainer: str
    """torch or mlx."""
    threads: int
    place: str
    learner: L
    answerer: LlamaCppModel | SameModel
    view: View

    @property
    def model_name(self) -> str:
        """The model's name as it was typed."""
        return self.model.name

    def describe(self) -> tuple[str, str, str]:
        """Describes the model, the trained part and the answering engine, for people."""
        name = Path(self.model.name).name if self.model.source == "path" else self.model.name
        layers = counted(len(self.learner.adapter().pairs), "layer")
        return (
            f"{name}, trained on {self.trainer}, {self.place}",
            f"LoRA of {self.learner.parameters:,} parameters in {layers}",
            f"answers by {self.answerer.backend.name}, {self.answerer.parallel} at once,"
            f" {counted(self.threads, 'thread')}",
        )

    def encoded(self, prompts: Sequence[Prompt], system: str | None) -> list[tuple[Prompt, list[int]]]:
        """Returns the prompts with their tokens.

        Prompts without room for an answer are dropped with a warning.

        Raises ContextFullError if no prompt fits, and UsageError if the template refuses one.
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
                raise ContextFullError(said, "shorten them, or set a larger --context")
            self.view.warn(f"{said}; they are left out")
        return fitting

    def _tokens(self, prompts: Sequence[Prompt], system: str | None) -> Iterator[tuple[Prompt, list[int]]]:
        """Yields each prompt with its tokens. A million prompts take minutes, so it reports progress."""
        warn = once(self.view.warn)
        for i, prompt in enumerate(prompts):
            if i and i % 1000 == 0:
                self.view.loading(f"encoding prompts: {i:,} of {len(prompts):,}", 0, None)
            try:
                asked = with_system(prompt.messages, system)
                yield prompt, chat_tokens(self.answerer.backend, asked, warn=warn)
            except UsageError as why:
                raise UsageError(f"{prompt.where}: {why.message}", why.hint) from why

    def use(self, adapter: Adapter) -> None:
        """Uses this adapter from now on."""
        self.learner.put(adapter)
        self.answerer.refresh(adapter)

    def identity(self) -> dict[str, Any]:
        """Returns the properties of the engines that determine the outcome, bit for bit."""
        return {
            "model": {"name": self.model.header.name, "sha256": weights_digest(self.model)},
            "engines": {
                "device": self.place,
                "rollouts": self.answerer.backend.name,
                "parallel": self.answerer.parallel,
                "context": self.answerer.backend.context,
                "threads": self.threads,
            },
        }

    def versions(self) -> dict[str, str]:
        """Returns the versions of Python and of the engines' packages."""
        both = self.trainer, self.answerer.backend.name
        names = dict.fromkeys(package for name in both for package in engine(name).distributions)
        return {"python": platform.python_version(), **{name: version(name) for name in names}}


@contextmanager
def open_engines(objective: Objective[L], setup: Setup, trainer: str, view: View) -> Iterator[Engines[L]]:
    """Resolves and loads the model, once for training and, if that is faster, once more for answering.

    `trainer`: see `choose_trainer`. Raises ModelError for a model that cannot be trained.
    """
    settings = objective.settings
    _check_rollouts(setup.answers.rollouts, trainer)
    model = resolve(
        setup.model, formats=("safetensors", "gguf"), offline=setup.machine.offline, progress=view.loading
    )
    check_runs(model, trainer)
    context = _context(model, settings, setup.machine.context)
    _check_model(model, setup.answers.rollouts)
    folder = unpack(model, view.loading) if isinstance(model, GGUFModel) else model.path
    view.loading(f"loading {trainer}", 0, None)
    threads = setup.machine.threads or physical_cores()
    machine = setup.machine
    opened = trainer_of(trainer).open(
        folder, name=model.name, device=machine.device, dtype=machine.dtype, threads=threads
    )
    learner = objective.make_learner(
        opened,
        replace(new_adapter(opened.linear_layers(), settings), base_model=model.name),
        Descent(settings.weight_decay, settings.max_grad_norm),
        setup.machine.gradient_checkpointing,
    )
    parallel = min(setup.answers.parallel or PARALLEL, settings.answers_per_step)
    options = LoadOptions(
        context=context,
        sequences=parallel + SPARE_SEQUENCES,
        shared=False,
        threads=threads,
    )
    answerer = _answerer(model, opened, options, setup.answers.rollouts, parallel)
    try:
        yield Engines(model, settings, trainer, threads, opened.place.describe(), learner, answerer, view)
    finally:
        answerer.close()


def choose_trainer(asked: str, training: Training) -> str:
    """Chooses the engine to train: the requested one, or the best one for this machine.

    Raises UsageError if the engine cannot train this way, and BackendError if it is not installed.
    """
    trainers = {name: known for name in ENGINES if (known := engine(name).trainer) is not None}
    able = [name for name, known in trainers.items() if training in known.methods]
    chosen = asked
    if asked == "auto":
        own, _ = select_backend()
        chosen = own if own in able else able[-1]
    if chosen not in able:
        raise UsageError(
            f"the {chosen} engine does not support this training yet", f"use --backend {able[-1]}"
        )
    select_backend(chosen)  # raises BackendError with the install command if it is missing
    return chosen


def _check_rollouts(asked: str, trainer: str) -> None:
    if asked not in ("auto", "llama.cpp", trainer):
        raise UsageError(
            f"--rollouts is {asked}, but {trainer} trains: only {trainer} or llama.cpp can answer",
            f"use --rollouts {trainer}, or leave it out",
        )


def trainer_of(name: str) -> Trainer:
    """Returns the trainer of an engine that `choose_trainer` chose."""
    trainer = engine(name).trainer
    assert trainer is not None
    return trainer


def _context(model: Model, settings: TrainingSettings, asked: int | None) -> int:
    """Returns the context for a prompt and its answer.

    Raises UsageError if the answer alone would fill it.
    """
    wanted = settings.max_tokens + LONGEST_PROMPT
    trained = model.header.context_length or asked or wanted
    if asked is not None and asked > trained:
        raise UsageError(f"--context is {asked:,}; the model was trained on {trained:,}")
    context = asked or min(trained, wanted)
    if settings.max_tokens >= context:
        raise UsageError(
            f"--max-tokens is {settings.max_tokens:,}, but prompt and answer must fit {context:,}",
            "set a smaller --max-tokens",
        )
    return context


def _check_model(model: Model, rollouts: str) -> None:
    check_template(model.name, model.header.chat_template)
    if rollouts == "llama.cpp" and not isinstance(model, GGUFModel):
        raise UsageError(
            f"{model.name} is not a GGUF model, so llama.cpp cannot answer with it", "leave --rollouts out"
        )


def _does(n: int) -> str:
    return "does" if n == 1 else "do"


def _leaves(most: int) -> str:
    return f"leave {most:,}" if most > 0 else "leave none"


def _answerer(
    model: Model, opened: Opened, options: LoadOptions, asked: str, parallel: int
) -> LlamaCppModel | SameModel:
    """Opens the answering engine.

    It is llama.cpp for GGUF models on CPUs, because few CPUs compute bfloat16; otherwise the model that is
    trained.
    """
    wanted = asked == "llama.cpp" or (asked == "auto" and opened.place.on_cpu)
    if wanted and isinstance(model, GGUFModel):
        from emlocal.backends.llama_cpp import LlamaCppBackend

        return LlamaCppModel(LlamaCppBackend(model, options), model.header, parallel)
    return SameModel(opened.backend(options), parallel)


def new_adapter(layers: Mapping[str, tuple[int, int]], settings: TrainingSettings) -> Adapter:
    """Makes an adapter that changes nothing yet: A is random, B is 0 (Hu et al. 2021, §4.1).

    A's numbers are uniform within ±1/√in, like those of new linear layers. They come from the seed and the
    layer's name, so they are the same on every engine.

    Args:
        layers: (out, in) of each linear layer of the model, by its name.
    Raises:
        UsageError: no layer has one of the wanted names.
    """
    chosen = {name: shape for name, shape in layers.items() if _last(name) in settings.target_modules}
    missing = set(settings.target_modules) - {_last(name) for name in chosen}
    if missing:
        raise UsageError(
            f"the model has no linear layer called {' or '.join(sorted(missing))}",
            f"use some of these: --target-modules {','.join(sorted({_last(name) for name in layers}))}",
        )
    pairs = {}
    for name, (rows, columns) in chosen.items():
        key = np.array([settings.seed, request_key(name)], dtype=np.uint64)
        uniform = np.random.Generator(np.random.Philox(key=key)).random((settings.rank, columns))
        a = ((2 * uniform - 1) / math.sqrt(columns)).astype(np.float32)
        b = np.zeros((rows, settings.rank), np.float32)
        pairs[name] = LoraPair(a, b, settings.alpha / settings.rank)
    return Adapter(pairs)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
