"""What the rest of emlocal must know of an engine, which one runs and why, and how a model is to be loaded.

Each engine has one record: `emlocal/backends/<name>/__init__.py` has it as ENGINE and imports nothing heavy.
The command line, `doctor` and a result's provenance read the records of engines that are not installed.
`emlocal.backends` has the table. No numpy here: a model is on its way into memory before that is imported.
"""

import importlib.util
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from emlocal.backends import ENGINES, FOLDERS
from emlocal.errors import BackendError, UsageError

if TYPE_CHECKING:
    from emlocal.backends.base import Backend, ModelInfo
    from emlocal.backends.learner import Descent, EntropyLearner, EntropyObjective, PolicyLearner, Processes
    from emlocal.em.losses import PolicyObjective
    from emlocal.files import Progress
    from emlocal.models.adapters.adapter import Adapter
    from emlocal.models.header import ModelHeader
    from emlocal.models.memory import Terms
    from emlocal.models.resolve import Format, Model


KVType = Literal["f32", "f16", "q8_0", "q4_0"]
DEFAULT_CONTEXT = 8192
BATCH_CONTEXT = 2048
"""Tokens of a sequence in a batch, where nobody says: each has this room to itself."""


def python_warning(message: str) -> None:
    """Say it as Python says warnings."""
    warnings.warn(message, UserWarning, stacklevel=2)


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model."""

    context: int | None = None
    """The most tokens of a sequence; None: the model's own length, at most `DEFAULT_CONTEXT`."""
    sequences: int = 4
    """The most sequences held at once."""
    shared: bool = True
    """Whether they share room for `context` tokens in all. If not, each has that room to itself: that takes
    their number times the memory, and decoding many at once is faster (docs/decisions.md). In torch and mlx
    each has that room in any case; it is taken at once where it is not shared, else as it is needed."""
    threads: int | None = None
    """None: one per physical core. MLX chooses for itself."""
    kv_type: KVType | None = None
    """None: f16 in llama.cpp, the model's own in torch and mlx."""
    adapters: tuple[tuple["Adapter | Path", float], ...] = ()
    """(LoRA adapter: as it was read, or a GGUF file, a PEFT or an MLX folder; scale)."""
    warn: Callable[[str], None] = python_warning
    """Told what the user should know while the model runs. An engine does not print."""


def context_length(asked: int | None, trained: int) -> int:
    """The tokens asked for; else the model's own length, at most `DEFAULT_CONTEXT`.

    Raises UsageError for more than the model was trained for.
    """
    if asked is None:
        return min(trained, DEFAULT_CONTEXT)
    if asked > trained:
        raise UsageError(
            f"--context {asked:,} is longer than the {trained:,} tokens the model was trained for",
            f"use at most --context {trained}",
        )
    return asked


Training = Literal["em-ft", "em-rl"]


class Verdict(NamedTuple):
    """What `emlocal doctor` says of an engine."""

    status: Literal["ok", "warn", "fail"]
    text: str
    fix: tuple[str, ...] = ()
    """Command lines that fix it, the best first."""


@dataclass(frozen=True)
class Probe:
    """How `emlocal doctor` tries an engine: in a process of its own, which may die of it."""

    module: str
    """To import."""
    info: str
    """An expression of `module`: what it says of itself."""
    verdict: Callable[[Mapping[str, str]], Verdict]
    """Of what came out: "version", "path" and "info", or "why" it could not be imported."""
    always: bool = False
    """Whether it is quick enough to be tried wherever it is installed; else only where it is chosen."""


class Place(Protocol):
    """The device that a model is on."""

    @property
    def on_cpu(self) -> bool: ...
    def describe(self) -> str:
        """Device, number format and why: "cpu, float32 (no CUDA device)"."""


@dataclass(frozen=True)
class Opened(ABC):
    """A model in an engine, to be trained or to answer."""

    model: Any
    tokenizer: Any
    info: "ModelInfo"
    place: Place

    @abstractmethod
    def backend(self, options: "LoadOptions") -> "Backend":
        """The engine on this model as it is at any time; its `adapters` must be attached already."""

    @abstractmethod
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear layer but the head by its name, in the model's order."""

    def entropy_learner(
        self, adapter: "Adapter", descent: "Descent", objective: "EntropyObjective", *, checkpointing: bool
    ) -> "EntropyLearner":
        """To train this adapter on the model by EM-FT. `checkpointing`: compute activations twice rather than
        keep them. Raises UsageError where the engine cannot."""
        raise UsageError("this engine cannot train by EM-FT")

    def policy_learner(
        self,
        adapter: "Adapter",
        descent: "Descent",
        objective: "PolicyObjective",
        *,
        temperature: float,
        checkpointing: bool,
    ) -> "PolicyLearner":
        """The same by EM-RL, with the temperature at which answers are drawn."""
        raise UsageError("this engine cannot train by EM-RL")


class OpenModel(Protocol):
    """Loads the model in a folder, to be trained on so many CPU threads.

    Raises ModelError for a folder that cannot be used, UsageError for an unknown device or format.
    """

    def __call__(self, folder: Path, *, name: str, device: str, dtype: str, threads: int) -> Opened: ...


@dataclass(frozen=True)
class Trainer:
    """How an engine trains."""

    open: OpenModel
    methods: "tuple[Training, ...]"
    """What it can train by."""
    processes: "Callable[[bool], Processes] | None" = None
    """Those that a launcher started, where it can train with several: takes whether they compute on CPUs.
    Raises BackendError for a package that is missing."""


@dataclass(frozen=True)
class Engine:
    """One engine. What is not said is not there: no trainer, no bare loop."""

    name: str
    """As `--backend` has it."""
    package: str
    """What people install, by its name on the package index."""
    modules: tuple[str, ...]
    """All that it needs, by the names that Python imports."""
    distributions: tuple[str, ...]
    """What it computes with, whose versions belong beside a result."""
    formats: "tuple[Format, ...]"
    """The models that it runs, the format it likes best first."""
    suits: Callable[[str | None], str | None]
    """Why it is used by itself, for a model as the user names it; None where another engine is. May raise
    BackendError where it would be the only one, and is not installed."""
    memory_terms: "Callable[[ModelHeader, KVType | None], Terms]"
    """What an estimate of the memory that a model takes goes by."""
    loader: "Callable[[Model, LoadOptions, Progress, Callable[[], None]], Backend]"
    """See `load`."""
    probe: Probe
    check: Callable[[], None] = lambda: None
    """Raise BackendError, with what to do, where it cannot run here."""
    shares_context: bool = False
    """Whether its sequences can share the memory of one context."""
    trainer: Trainer | None = None
    bare_loop: "Callable[[Any, int, int, int], list[float]] | None" = field(default=None)
    """Decoding with an argmax and nothing else, which `emlocal bench` compares with: takes the backend, a
    sequence, a token and a number of steps, and gives the seconds of each step."""

    def load(
        self,
        model: "Model",
        options: "LoadOptions",
        progress: "Progress | None" = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> "Backend":
        """Load a model of one of the formats. `meanwhile` runs while it is on its way, where it can.

        Raises ModelError for a model or adapter that cannot be used, BackendError where memory runs out.
        """
        from emlocal.files import silent

        return self.loader(model, options, progress or silent, meanwhile)

    def installed(self) -> bool:
        """Whether its packages are there; they are not imported."""
        return all(importlib.util.find_spec(name) is not None for name in self.modules)

    def contexts_to_reserve(self, sequences: int, shared: bool) -> int:
        """For how many whole contexts there must be memory (LoadOptions.shared)."""
        return 1 if shared and self.shares_context else sequences


def load_unpacked(
    open_folder: "Callable[..., Backend]", model: "Model", options: "LoadOptions", progress: "Progress"
) -> "Backend":
    """A model as a Hugging Face folder in an engine that takes those; GGUF models are unpacked first."""
    from emlocal.models.resolve import FolderModel
    from emlocal.models.unpacked import unpack

    if isinstance(model, FolderModel):
        return open_folder(model.path, options, name=model.header.name)
    shown = model.path.name if model.source == "path" else model.name
    return open_folder(unpack(model, progress), options, name=shown, base=model.header)


def missing(what: str, install: str) -> BackendError:
    """The error for packages that are not there."""
    return BackendError(f"{what} not installed", install)


def wait_briefly() -> None:
    """Let GNU OpenMP's threads sleep after a short wait for one another, unless the user has chosen.

    By default they spin for milliseconds at each of some hundred barriers a token. As soon as another
    process wants a core, a token can then take seconds instead of 6 ms (2 cores, SmolLM2-135M); with this,
    24 to 89 ms, and next to no cost where the cores are free (docs/performance.md).
    The library reads it when it is loaded.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"


@cache
def engine(name: str) -> Engine:
    """An engine's record; the engine itself is not imported. Raises UsageError for an unknown name."""
    if name not in FOLDERS:
        known = f"{', '.join(ENGINES[:-1])} or {ENGINES[-1]}"
        raise UsageError(f"there is no engine {name}", f"use --backend {known}, or leave it out")
    found: Engine = import_module(f"emlocal.backends.{FOLDERS[name]}").ENGINE
    return found


def select_backend(asked: str = "auto", model: str | None = None) -> tuple[str, str]:
    """The engine to use and the reason for it. `model`: what it is to run, as the user names it.

    Raises UsageError for an engine that this version does not have, BackendError for one whose packages are
    not installed.
    """
    if asked != "auto":
        engine(asked).check()
        return asked, "asked for"
    found = ((name, engine(name).suits(model)) for name in FOLDERS)
    return next((name, reason) for name, reason in found if reason is not None)
