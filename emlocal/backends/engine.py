"""The records of the engines, the choice of one with its reason, and the options for loading a model.

Each engine has one record, ENGINE in `emlocal/backends/<name>/__init__.py`, which imports nothing heavy. The
command line, `doctor` and a result's provenance also read the records of engines that are not installed. The
table of engines is in `emlocal.backends`. This module does not import numpy: loading a model begins before
numpy is imported.
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
"""The default length of a sequence in a batch, in tokens: each sequence has this room to itself."""


def python_warning(message: str) -> None:
    """Issues a Python warning."""
    warnings.warn(message, UserWarning, stacklevel=2)


SplitMode = Literal["none", "layer", "row", "tensor"]


@dataclass(frozen=True)
class OffloadOptions:
    """Which layers go to GPUs, in an engine that also computes on CPUs. Default values: nobody asked."""

    gpu_layers: str | None = None
    """A number, "all", or "auto" for as many as fit. None: auto."""
    split_mode: SplitMode | None = None
    """How several GPUs share the layers. None: the engine's own way."""
    main_gpu: int | None = None
    tensor_split: tuple[float, ...] = ()
    """The share of each GPU."""

    @property
    def layers(self) -> str:
        """The number, "all" or "auto"."""
        return self.gpu_layers or "auto"

    @property
    def given(self) -> bool:
        """Whether somebody asked for anything."""
        return self != OffloadOptions()


@dataclass(frozen=True)
class LoadOptions:
    """Options for loading a model."""

    context: int | None = None
    """The most tokens of a sequence; None: the model's own length, at most `DEFAULT_CONTEXT`."""
    sequences: int = 4
    """The most sequences held at once."""
    shared: bool = True
    """Whether the sequences share room for `context` tokens in all.

    If not, each sequence has that room to itself. That takes more memory, in proportion to their number, and
    decoding many at once is faster (docs/decisions.md). In torch and mlx each sequence has that room in any
    case; it is allocated at once if not shared, otherwise as it is needed.
    """
    threads: int | None = None
    """Number of threads; None: one per physical core. MLX chooses for itself."""
    kv_type: KVType | None = None
    """Type of keys and values; None: f16 in llama.cpp, the model's own type in torch and mlx."""
    adapters: tuple[tuple["Adapter | Path", float], ...] = ()
    """Pairs of (LoRA adapter, scale).

    The adapter was read already, or is a GGUF file, a PEFT or an MLX folder.
    """
    warn: Callable[[str], None] = python_warning
    """A callback for warnings to the user while the model runs. An engine does not print."""
    offload: OffloadOptions = OffloadOptions()
    """Which layers go to GPUs; engines without `Engine.moved` ignore it."""


def context_length(asked: int | None, trained: int) -> int:
    """Returns the tokens asked for, or by default the model's own length, at most `DEFAULT_CONTEXT`.

    Raises UsageError for more than the model was trained for.
    """
    if asked is None:
        return min(trained, DEFAULT_CONTEXT)
    if asked > trained:
        raise UsageError(
            f"--context {asked:,} exceeds the {trained:,} tokens that the model was trained for",
            f"use at most --context {trained}",
        )
    return asked


Training = Literal["em-ft", "em-rl"]


class Verdict(NamedTuple):
    """The result of `emlocal doctor` for an engine."""

    status: Literal["ok", "warn", "fail"]
    text: str
    fix: tuple[str, ...] = ()
    """Command lines that fix it, the best first."""


@dataclass(frozen=True)
class Probe:
    """How `emlocal doctor` tests an engine: in a process of its own, which the test may kill."""

    module: str
    """The module to import."""
    info: str
    """An expression of `module` that gives facts about the engine."""
    verdict: Callable[[Mapping[str, str]], Verdict]
    """Returns the verdict from the test's "version", "path" and "info", or from "why" the import failed."""
    always: bool = False
    """Whether the test is quick enough to run wherever the engine is installed, not only if it is chosen."""


class Place(Protocol):
    """The device that a model is on."""

    @property
    def on_cpu(self) -> bool: ...
    def describe(self) -> str:
        """Returns device, number format and reason: "cpu, float32 (no CUDA device)"."""


@dataclass(frozen=True)
class Opened(ABC):
    """A model in an engine, to train or to answer with."""

    model: Any
    tokenizer: Any
    info: "ModelInfo"
    place: Place

    @abstractmethod
    def backend(self, options: "LoadOptions") -> "Backend":
        """Returns the engine on this model, which may change later; `adapters` must be attached already."""

    @abstractmethod
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Returns (out, in) of each linear layer except the head, by name, in the model's order."""

    def entropy_learner(
        self, adapter: "Adapter", descent: "Descent", objective: "EntropyObjective", *, checkpointing: bool
    ) -> "EntropyLearner":
        """Returns a learner that trains this adapter on the model by EM-FT.

        `checkpointing`: compute activations twice instead of keeping them. Raises UsageError if the engine
        cannot.
        """
        raise UsageError("this engine cannot train by EM-FT", "use --backend torch")

    def policy_learner(
        self,
        adapter: "Adapter",
        descent: "Descent",
        objective: "PolicyObjective",
        *,
        temperature: float,
        checkpointing: bool,
    ) -> "PolicyLearner":
        """Returns a learner that trains this adapter on the model by EM-RL.

        `temperature`: at which answers are drawn. Raises UsageError if the engine cannot.
        """
        raise UsageError("this engine cannot train by EM-RL", "use --backend torch")


class OpenModel(Protocol):
    """A function that loads the model in a folder, to be trained with this number of CPU threads.

    Raises ModelError for a folder that cannot be used, UsageError for an unknown device or format.
    """

    def __call__(self, folder: Path, *, name: str, device: str, dtype: str, threads: int) -> Opened: ...


@dataclass(frozen=True)
class Trainer:
    """How an engine trains."""

    open: OpenModel
    methods: "tuple[Training, ...]"
    """The methods that it can train by."""
    processes: "Callable[[bool], Processes] | None" = None
    """A function that returns the processes that a launcher started; None if it trains with one only.

    It takes whether they compute on CPUs, and raises BackendError for a package that is missing.
    """


@dataclass(frozen=True)
class Engine:
    """The record of one engine. A field's default means that the engine lacks the feature."""

    name: str
    """The name for `--backend`."""
    package: str
    """The package that people install, by its name on the package index."""
    modules: tuple[str, ...]
    """All modules that it needs, by the names that Python imports."""
    distributions: tuple[str, ...]
    """The packages that it computes with; their versions belong beside a result."""
    formats: "tuple[Format, ...]"
    """The formats of models that it runs, the preferred one first."""
    suits: Callable[[str | None], str | None]
    """Returns the reason to choose this engine by default, for a model as the user names it; None otherwise.

    May raise BackendError if it is the only engine for the model, and is not installed.
    """
    memory_terms: "Callable[[ModelHeader, KVType | None], Terms]"
    """Returns the terms for an estimate of the memory that a model takes."""
    loader: "Callable[[Model, LoadOptions, Progress, Callable[[], None]], Backend]"
    """The function behind `load`."""
    probe: Probe
    check: Callable[[], None] = lambda: None
    """Raises BackendError, with a fix, if the engine cannot run here."""
    moved: "Callable[[ModelHeader, KVType | None, OffloadOptions], Callable[[int], int]] | None" = None
    """Returns the function `Terms.moved` for these options; None if the engine has no `--gpu-layers`."""
    shares_context: bool = False
    """Whether its sequences can share the memory of one context."""
    trainer: Trainer | None = None
    bare_loop: "Callable[[Any, int, int, int], list[float]] | None" = field(default=None)
    """Decodes with an argmax and nothing else; `emlocal bench` compares with it.

    It takes the backend, a sequence, a token and a number of steps, and returns the seconds of each step.
    """

    def load(
        self,
        model: "Model",
        options: "LoadOptions",
        progress: "Progress | None" = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> "Backend":
        """Loads a model of one of the formats. `meanwhile` runs during the loading, if the engine can.

        Raises ModelError for a model or adapter that cannot be used, BackendError if memory runs out.
        """
        from emlocal.files import silent

        return self.loader(model, options, progress or silent, meanwhile)

    def installed(self) -> bool:
        """Returns whether its packages are installed; they are not imported."""
        return all(importlib.util.find_spec(name) is not None for name in self.modules)

    def contexts_to_reserve(self, sequences: int, shared: bool) -> int:
        """Returns the number of whole contexts that need memory (see LoadOptions.shared)."""
        return 1 if shared and self.shares_context else sequences


def load_unpacked(
    open_folder: "Callable[..., Backend]", model: "Model", options: "LoadOptions", progress: "Progress"
) -> "Backend":
    """Loads a model in an engine that takes Hugging Face folders; a GGUF model is unpacked first."""
    from emlocal.models.resolve import FolderModel
    from emlocal.models.unpacked import unpack

    if isinstance(model, FolderModel):
        return open_folder(model.path, options, name=model.header.name)
    shown = model.path.name if model.source == "path" else model.name
    return open_folder(unpack(model, progress), options, name=shown, base=model.header)


def missing(what: str, install: str) -> BackendError:
    """Returns the error for packages that are not installed."""
    return BackendError(f"{what} not installed", install)


def wait_briefly() -> None:
    """Lets GNU OpenMP's threads sleep after a short wait for one another, unless the user has chosen.

    By default they spin for milliseconds at each of some hundred barriers per token. When another process
    wants a core, a token can then take seconds instead of 6 ms (2 cores, SmolLM2-135M). With this setting it
    takes 24 to 89 ms, and it costs next to nothing while the cores are free (docs/performance.md). The
    library reads the variable when it is loaded.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"


@cache
def engine(name: str) -> Engine:
    """Returns an engine's record, without importing the engine. Raises UsageError for an unknown name."""
    if name not in FOLDERS:
        known = f"{', '.join(ENGINES[:-1])} or {ENGINES[-1]}"
        raise UsageError(f"there is no engine {name}", f"use --backend {known}, or leave it out")
    found: Engine = import_module(f"emlocal.backends.{FOLDERS[name]}").ENGINE
    return found


def select_backend(asked: str = "auto", model: str | None = None) -> tuple[str, str]:
    """Returns the engine to use and the reason for it. `model`: the model to run, as the user names it.

    Raises UsageError for an engine that this version does not have, BackendError for one whose packages are
    not installed.
    """
    if asked != "auto":
        engine(asked).check()
        return asked, "asked for"
    found = ((name, engine(name).suits(model)) for name in FOLDERS)
    return next((name, reason) for name, reason in found if reason is not None)
