"""From a model's name to a running engine: the one way there, for the command line and for Python."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal.backends.engine import BATCH_CONTEXT, Engine, LoadOptions, context_length, engine, select_backend
from emlocal.cancel import interruptible
from emlocal.errors import UsageError
from emlocal.files import Progress, silent
from emlocal.models.header import ModelHeader
from emlocal.models.memory import Terms, check_memory, estimate
from emlocal.models.resolve import FolderModel, Model, resolve
from emlocal.models.templates import start_process
from emlocal.settings.options import EngineOptions
from emlocal.settings.table import check_settings

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.models.adapters.adapter import Adapter

MOST_PARALLEL = 16
"""Sequences in a batch, where nobody says: on CPUs more gain little (docs/performance.md)."""
_LEFT_FREE = 0.9  # of the free memory, a batch takes no more than this without being asked

Warn = Callable[[str], None]
"""Takes a line that people should read."""
Adapters = Sequence[tuple[Path, float]]
"""(LoRA adapter: a GGUF file, a PEFT or an MLX folder; scale)."""


@dataclass(frozen=True)
class Loaded:
    """A model in an engine, and the files that it came from."""

    backend: "Backend"
    model: Model
    adapters: Adapters
    reason: str
    """Why this engine."""

    @property
    def parallel(self) -> int:
        """For how many sequences at once there is room, the spare ones aside."""
        from emlocal.generation.scheduler import SPARE_SEQUENCES

        return self.backend.max_sequences - SPARE_SEQUENCES

    def describe(self) -> str:
        """Model, engine, why, and how it runs, in one line."""
        backend = self.backend
        model = f"{backend.info.name} ({self.model.header.quantization})"
        return f"{model} on {backend.name}, {self.reason}; {backend.describe()}"


def warn_in_python(text: str) -> None:
    """A warning as Python has them: on stderr once, unless the caller filters it."""
    warnings.warn(text, stacklevel=2)


def load(
    wanted: EngineOptions,
    adapters: Adapters = (),
    *,
    sequences: int,
    progress: Progress = silent,
    warn: Warn = warn_in_python,
) -> Loaded:
    """Resolve, check and load a model for one prompt at a time: `sequences` that share one context.

    `adapters`: beside those that `wanted` names, in the form that Python has for them.

    Raises UsageError for settings out of range, ModelError for a model or adapter that cannot be used,
    KeyboardInterrupt once the engine is free again where Ctrl-C came while it was loaded.
    """
    return _load(wanted, adapters, sequences, True, progress, warn)


def load_for_batch(
    wanted: EngineOptions,
    parallel: int | None,
    adapters: Adapters = (),
    *,
    spare: int = 0,
    progress: Progress = silent,
    warn: Warn = warn_in_python,
) -> Loaded:
    """The same for `parallel` sequences, each with room of its own; None: as many as memory allows.

    `spare`: sequences beside those and the scheduler's own.
    """
    from emlocal.generation.scheduler import SPARE_SEQUENCES

    check_parallel(parallel)
    return _load(wanted, adapters, parallel, False, progress, warn, SPARE_SEQUENCES + spare)


def check_parallel(parallel: int | None) -> None:
    """Raise UsageError for a number of sequences that is out of range."""
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
) -> Loaded:
    _check(wanted)
    name, reason = select_backend(wanted.backend or "auto", wanted.model)
    chosen = engine(name)
    adapters = [*map(adapter_and_scale, wanted.adapter), *adapters]
    model = resolve(wanted.model, formats=chosen.formats, offline=wanted.offline, progress=progress)
    start_process(model.header.chat_template)
    with ExitStack() as opened:
        read = tuple((_read(path, model, chosen, opened, warn), scale) for path, scale in adapters)
        trained = model.header.context_length
        asked = wanted.context or (None if shared else min(trained, BATCH_CONTEXT))
        context = context_length(asked, trained)
        terms = chosen.memory_terms(model.header, wanted.kv_type)
        count = (sequences or _as_many_as_fit(model.header, context, terms, spare)) + spare
        check_memory(model.header, context, terms, n_seqs=chosen.contexts_to_reserve(count, shared))
        options = LoadOptions(context, count, shared, wanted.threads, wanted.kv_type, read, warn)
        # llama.cpp calls back while it loads: nothing may be raised there
        with interruptible() as cancelled:
            backend = chosen.load(model, options, progress, partial(_prepare, model.header))
    if cancelled.requested:
        backend.close()
        raise KeyboardInterrupt
    return Loaded(backend, model, adapters, reason)


def _prepare(header: ModelHeader) -> None:
    """Import and compile what the first answer will need."""
    import emlocal.generation.prompt
    import emlocal.rendering  # noqa: F401
    from emlocal.models.templates import prepare

    prepare(header.chat_template)


def _as_many_as_fit(header: ModelHeader, context: int, terms: Terms, spare: int) -> int:
    """Parallel sequences for which there is memory, at least 1, with `spare` ones besides."""
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
    """An adapter in the form that the engine takes, checked before the model is loaded: its numbers, or a
    GGUF file for an engine that knows no other format, which lasts as long as `opened`."""
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


def adapter_and_scale(text: str) -> tuple[Path, float]:
    """What --adapter says: PATH or PATH=SCALE. Raises UsageError."""
    path, scale = Path(text), 1.0
    if not path.exists() and "=" in text:
        name, _, number = text.rpartition("=")
        try:
            path, scale = Path(name), float(number)
        except ValueError:
            raise UsageError(f"--adapter is {text!r}; after '=' comes the scale, a number") from None
        if not isfinite(scale):
            raise UsageError(f"--adapter is {text!r}; a scale is finite")
    if not path.exists():
        raise UsageError(f"there is no adapter {path}")
    return path, scale
