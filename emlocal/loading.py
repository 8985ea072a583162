"""The one way from a model's name to a running engine, for the command line and for Python."""

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal.backends.engine import (
    BATCH_CONTEXT,
    Engine,
    LoadOptions,
    OffloadOptions,
    context_length,
    engine,
    select_backend,
)
from emlocal.cancel import interruptible
from emlocal.errors import ModelError, UsageError
from emlocal.files import Progress, silent
from emlocal.models.choice import AUTO, Room, best
from emlocal.models.header import ModelHeader
from emlocal.models.memory import Terms, available, check_memory, estimate
from emlocal.models.resolve import (
    CatalogEntry,
    FolderModel,
    Model,
    local_path,
    meaning,
    on_disk,
    resolve,
)
from emlocal.models.templates import start_process
from emlocal.settings.options import EngineOptions
from emlocal.settings.table import check_settings
from emlocal.text import human_size

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.models.adapters.adapter import Adapter

MOST_PARALLEL = 16
"""Sequences of a batch if nobody sets a number: on CPUs, more gain little (docs/performance.md)."""
_LEFT_FREE = 0.9  # the largest share of the free memory that a batch takes by itself

Warn = Callable[[str], None]
"""A callback that takes a warning for people."""
Adapters = Sequence[tuple[Path, float]]
"""Pairs of (LoRA adapter, scale); the adapter is a GGUF file, a PEFT folder or an MLX folder."""


@dataclass(frozen=True)
class Loaded:
    """A model in an engine, and the files that it came from."""

    backend: "Backend"
    model: Model
    adapters: Adapters
    reason: str
    """Why this engine was chosen."""

    @property
    def parallel(self) -> int:
        """How many sequences fit at once, without the spare ones."""
        from emlocal.generation.scheduler import SPARE_SEQUENCES

        return self.backend.max_sequences - SPARE_SEQUENCES

    def describe(self) -> str:
        """Returns one line with the model, the engine, the reason for it, and how it runs."""
        backend = self.backend
        model = f"{backend.info.name} ({self.model.header.quantization})"
        return f"{model} on {backend.name}, {self.reason}; {backend.describe()}"


def warn_in_python(text: str) -> None:
    """Issues a Python warning: on stderr once, unless the caller filters it."""
    warnings.warn(text, stacklevel=2)


def load(
    wanted: EngineOptions,
    adapters: Adapters = (),
    *,
    sequences: int,
    progress: Progress = silent,
    warn: Warn = warn_in_python,
) -> Loaded:
    """Resolves, checks and loads a model for one prompt at a time: `sequences` that share one context.

    `adapters` are added to those that `wanted` names, and have Python's form.

    Raises UsageError for settings out of range and ModelError for a model or adapter that cannot be used. If
    Ctrl-C came while the engine was loading, raises KeyboardInterrupt after freeing the engine.
    """
    return _load(wanted, adapters, sequences, True, progress, warn)


def load_for_batch(
    wanted: EngineOptions,
    parallel: int | None,
    adapters: Adapters = (),
    *,
    spare: int = 0,
    context: int = BATCH_CONTEXT,
    progress: Progress = silent,
    warn: Warn = warn_in_python,
) -> Loaded:
    """Resolves, checks and loads a model for `parallel` sequences, each with room of its own.

    `parallel`: None means as many as memory allows. `spare`: sequences in addition to those and to the
    scheduler's own. `context`: the tokens of each, if `wanted` does not say.
    """
    from emlocal.generation.scheduler import SPARE_SEQUENCES

    check_parallel(parallel)
    return _load(wanted, adapters, parallel, False, progress, warn, SPARE_SEQUENCES + spare, context)


def check_parallel(parallel: int | None) -> None:
    """Raises UsageError for a number of sequences that is out of range."""
    if parallel is not None and not 1 <= parallel <= 256:
        raise UsageError(f"--parallel is {parallel}; it must be between 1 and 256")


def _load(
    wanted: EngineOptions,
    adapters: Adapters,
    sequences: int | None,
    shared: bool,
    progress: Progress,
    warn: Warn,
    spare: int = 0,
    most: int = BATCH_CONTEXT,
) -> Loaded:
    _check(wanted)
    wanted = settled(wanted)
    name, reason = select_backend(wanted.backend or "auto", wanted.model)
    chosen = engine(name)
    adapters = [*map(adapter_and_scale, wanted.adapter), *adapters]
    model = resolve(wanted.model, formats=chosen.formats, offline=wanted.offline, progress=progress)
    if "safetensors" in chosen.formats:
        from emlocal.models.unpacked import check_runs

        check_runs(model, name)
    start_process(model.header.chat_template)
    with ExitStack() as opened:
        read = tuple((_read(path, model, chosen, opened, warn), scale) for path, scale in adapters)
        trained = model.header.context_length
        asked = wanted.context or (None if shared else min(trained, most))
        context = context_length(asked, trained)
        terms, offload = chosen.memory_terms(model.header, wanted.kv_type), offload_of(wanted)
        if chosen.moved is not None:
            terms = terms._replace(moved=chosen.moved(model.header, wanted.kv_type, offload))
        elif offload.given:
            warn(f"--gpu-layers and its kind are for llama.cpp; {name} puts the whole model on one device")
        count = (sequences or _as_many_as_fit(model.header, context, terms, spare)) + spare
        check_memory(model.header, context, terms, n_seqs=chosen.contexts_to_reserve(count, shared))
        options = LoadOptions(context, count, shared, wanted.threads, wanted.kv_type, read, warn, offload)
        # llama.cpp calls back while it loads, and an exception must not be raised in a callback
        with interruptible() as cancelled:
            backend = chosen.load(model, options, progress, partial(_prepare, model.header))
    if cancelled.requested:
        backend.close()
        raise KeyboardInterrupt
    return Loaded(backend, model, adapters, reason)


def offload_of(wanted: EngineOptions) -> OffloadOptions:
    """Returns which layers the settings put on GPUs."""
    shares = tuple(map(float, wanted.tensor_split.split(","))) if wanted.tensor_split else ()
    return OffloadOptions(wanted.gpu_layers, wanted.split_mode, wanted.main_gpu, shares)


def room_here() -> Room:
    """Returns the memory that is free on this machine, and on its GPUs if llama.cpp can use them."""
    from emlocal.backends.llama_cpp.devices import gpus_here

    return Room(available(), tuple(gpu.free for gpu in gpus_here() if not gpu.shared))


def best_here(wanted: EngineOptions) -> CatalogEntry | None:
    """Returns the model that `-m auto` means here; None if the name means something else.

    Raises UsageError for another engine than llama.cpp, and ModelError if no model fits.
    """
    if wanted.model is None or wanted.model.lower() != AUTO or local_path(wanted.model) is not None:
        return None
    if (wanted.backend or "auto") not in ("auto", "llama.cpp"):
        raise UsageError(
            f"-m auto chooses among models for llama.cpp, and --backend is {wanted.backend}",
            "name a model, or leave --backend out",
        )
    room = room_here()
    entry = best(room)
    if entry is None:
        raise ModelError(
            f"no model of the catalogue fits into {human_size(room.memory)} of free memory",
            "close other programs, or name a model: emlocal models list",
        )
    return entry


def settled(
    wanted: EngineOptions, ask: Callable[[CatalogEntry], bool] = lambda entry: False
) -> EngineOptions:
    """Returns the settings with the name of the best model in place of "auto".

    `ask`: called for a model that is not on this machine; returns whether to fetch it. Raises ModelError if
    it must not be fetched, and as `best_here` does.
    """
    entry = best_here(wanted)
    if entry is None:
        return wanted
    if not on_disk(meaning(entry.alias)) and (wanted.offline or not ask(entry)):
        raise ModelError(
            f"-m auto means {entry.alias} here, which is not on this machine",
            f"fetch it ({human_size(entry.bytes)}): emlocal models pull {entry.alias}",
        )
    return replace(wanted, model=entry.alias, backend="llama.cpp")


def _prepare(header: ModelHeader) -> None:
    """Imports and compiles what the first answer will need."""
    import emlocal.generation.prompt
    import emlocal.rendering  # noqa: F401
    from emlocal.models.templates import prepare

    prepare(header.chat_template)


def _as_many_as_fit(header: ModelHeader, context: int, terms: Terms, spare: int) -> int:
    """Returns how many parallel sequences fit into memory, at least 1, with `spare` more."""
    for n in range(MOST_PARALLEL, 1, -1):
        if estimate(header, context, terms, n_seqs=n + spare) <= _LEFT_FREE * terms.free:
            return n
    return 1


def _check(wanted: EngineOptions) -> None:
    check_settings(wanted)
    cores = os.cpu_count() or 1
    if wanted.threads is not None and wanted.threads > 4 * cores:
        raise UsageError(f"--threads is {wanted.threads}; it must be between 1 and {4 * cores} here")


def _read(path: Path, model: Model, chosen: Engine, opened: ExitStack, warn: Warn) -> "Adapter | Path":
    """Reads an adapter in the form that the engine takes, before the model is loaded.

    That form is the adapter's numbers or, for an engine that reads GGUF only, a GGUF file that exists as long
    as `opened`.
    """
    from emlocal.models.adapters import as_gguf, read_adapter
    from emlocal.models.adapters.origin import other_base

    found: Adapter | Path
    if chosen.formats == ("gguf",):
        assert not isinstance(model, FolderModel)
        found = opened.enter_context(as_gguf(path, model.header))
    else:
        found = read_adapter(path, None if isinstance(model, FolderModel) else model.header)
    if other := other_base(path, model.name, model.header):
        warn(other)
    return found


NamedAdapters = Mapping[str, tuple[Path, float]]
"""Adapters by the name under which requests choose them: path and scale."""


def named_apart(values: Sequence[str]) -> tuple[tuple[str, ...], NamedAdapters]:
    """Takes the values NAME=PATH[=SCALE] out of those of --adapter. Raises UsageError.

    Returns the other values, and the adapters by name. PATH=SCALE is no name: its second part is a number.
    """
    others: list[str] = []
    named: dict[str, tuple[Path, float]] = {}
    for text in values:
        name, equals, rest = text.partition("=")
        if not equals or Path(text).expanduser().exists() or _is_number(rest):
            others.append(text)
            continue
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise UsageError(
                f"--adapter is {text!r}; a name has letters, digits, '.', '_' and '-'",
                "give NAME=PATH, or PATH=SCALE",
            )
        if name in named:
            raise UsageError(f"two adapters have the name {name}", "give each another name")
        named[name] = adapter_and_scale(rest)
    return tuple(others), named


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not Path(text).exists()


def add_adapters(loaded: Loaded, named: NamedAdapters, warn: Warn = warn_in_python) -> Mapping[str, int]:
    """Loads adapters beside each other, and returns their numbers in the engine, by name.

    Raises UsageError for an engine that cannot hold several, or for a name that is the model's; ModelError
    for an adapter that cannot be used.
    """
    from emlocal.backends.adapted import Adapting
    from emlocal.models.adapters.origin import other_base

    backend, model = loaded.backend, loaded.model
    if not isinstance(backend, Adapting):
        raise UsageError(
            f"the {backend.name} engine cannot hold several adapters, of which requests choose one",
            "leave NAME= out to load one for all requests, or use --backend llama.cpp",
        )
    if backend.info.name in named:
        raise UsageError(f"an adapter has the model's name, {backend.info.name}", "give it another name")
    numbers = {}
    for name, (path, scale) in named.items():
        if other := other_base(path, model.name, model.header):
            warn(other)
        numbers[name] = backend.add_adapter(path, scale)
    return numbers


def adapter_and_scale(text: str) -> tuple[Path, float]:
    """Returns path and scale from a value of --adapter: PATH or PATH=SCALE. Raises UsageError."""
    path, scale = Path(text).expanduser(), 1.0
    if not path.exists() and "=" in text:
        name, _, number = text.rpartition("=")
        try:
            path, scale = Path(name).expanduser(), float(number)
        except ValueError:
            raise UsageError(f"--adapter is {text!r}; the scale after '=' must be a number") from None
        if not isfinite(scale):
            raise UsageError(f"--adapter is {text!r}; the scale must be finite")
    if not path.exists():
        raise UsageError(f"there is no adapter {path}", "name a PEFT or MLX folder, or a GGUF file")
    return path, scale
