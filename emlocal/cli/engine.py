"""From flags to a loaded model, with the one line that says which and why."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal import console
from emlocal.backends.options import BATCH_CONTEXT, KVType, LoadOptions, context_length
from emlocal.backends.select import engine, select_backend
from emlocal.cancel import interruptible
from emlocal.errors import UsageError
from emlocal.models.header import ModelHeader
from emlocal.models.memory import Terms, check_memory, estimate
from emlocal.models.resolve import FolderModel, Model, resolve
from emlocal.models.templates import start_process
from emlocal.settings.engine import EngineOptions

if TYPE_CHECKING:
    from emlocal.backends.base import Backend

MOST_PARALLEL = 16
"""Sequences in a batch, where nobody says: on CPUs more gain little (docs/performance.md)."""
_LEFT_FREE = 0.9  # of the free memory, a batch takes no more than this without being asked


@dataclass(frozen=True)
class Opened:
    """A loaded model, and the file that it came from."""

    backend: "Backend"
    model: Model
    adapters: tuple[tuple[Path, float], ...]


@contextmanager
def open_backend(options: EngineOptions, *, sequences: int, quiet: bool) -> Iterator["Backend"]:
    """Resolve, check and load the model, for one prompt at a time; free it at the end.

    Raises UsageError for settings out of range, ModelError for a model or adapter that cannot be used.
    """
    with _opened(options, sequences, True, quiet) as opened:
        yield opened.backend


@contextmanager
def open_for_batch(options: EngineOptions, parallel: int | None, *, quiet: bool) -> Iterator[Opened]:
    """The same for many sequences, each with room of its own: `parallel`, or as memory allows."""
    if parallel is not None and not 1 <= parallel <= 256:
        raise UsageError(f"--parallel is {parallel}; it must be between 1 and 256")
    with _opened(options, parallel, False, quiet) as opened:
        yield opened


@contextmanager
def _opened(options: EngineOptions, sequences: int | None, shared: bool, quiet: bool) -> Iterator[Opened]:
    _check(options)
    name, reason = select_backend(options.backend or "auto", options.model)
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    with console.progress(quiet) as progress:
        model = resolve(
            options.model, formats=engine(name).formats, offline=options.offline, progress=progress
        )
    start_process(model.header.chat_template)
    adapters = tuple(_adapter(text, model, name, quiet) for text in options.adapter)
    trained = model.header.context_length
    context = context_length(options.context or (None if shared else min(trained, BATCH_CONTEXT)), trained)
    kv_type: KVType | None = options.kv_type
    terms = engine(name).memory_terms(model.header, kv_type)
    if not shared:
        from emlocal.generation.scheduler import SPARE_SEQUENCES as SPARE

        sequences = SPARE + (sequences or _as_many_as_fit(model.header, context, terms, SPARE))
    assert sequences is not None
    check_memory(model.header, context, terms, n_seqs=engine(name).contexts_to_reserve(sequences, shared))
    load = LoadOptions(
        context=context,
        sequences=sequences,
        shared=shared,
        threads=options.threads,
        kv_type=kv_type,
        adapters=adapters,
        warn=console.warn,
    )
    # llama.cpp calls back while it loads: nothing may be raised there
    with interruptible() as cancelled, console.progress(quiet) as progress:
        backend = engine(name).load(model, load, progress, partial(_prepare, model.header))
    if cancelled.requested:
        backend.close()
        raise KeyboardInterrupt
    if not quiet:
        console.note(
            f"{backend.info.name} ({model.header.quantization}) on {name}, {reason}; {backend.describe()}"
        )
    try:
        yield Opened(backend, model, adapters)
    finally:
        backend.close()


def _prepare(header: ModelHeader) -> None:
    """Import and compile what the first answer will need."""
    import emlocal.answers
    import emlocal.generation.prompt  # noqa: F401
    from emlocal.models.templates import prepare

    prepare(header.chat_template)


def _as_many_as_fit(header: ModelHeader, context: int, terms: Terms, spare: int) -> int:
    """Parallel sequences for which there is memory, at least 1, with `spare` ones besides."""
    for n in range(MOST_PARALLEL, 1, -1):
        if estimate(header, context, terms, n_seqs=n + spare) <= _LEFT_FREE * terms.free:
            return n
    return 1


def _check(options: EngineOptions) -> None:
    if options.context is not None and options.context < 16:
        raise UsageError(f"--context is {options.context}; it must be at least 16 tokens")
    cores = os.cpu_count() or 1
    if options.threads is not None and not 1 <= options.threads <= 4 * cores:
        raise UsageError(f"--threads is {options.threads}; it must be between 1 and {4 * cores} here")


def _adapter(text: str, model: Model, engine: str, quiet: bool) -> tuple[Path, float]:
    """PATH or PATH=SCALE, the adapter checked against the model before that is loaded."""
    from emlocal.models.adapters.origin import other_base
    from emlocal.models.adapters.reading import as_gguf, read_adapter

    path, scale = adapter_and_scale(text)
    if engine != "llama.cpp":
        read_adapter(path, None if isinstance(model, FolderModel) else model.header)
    else:
        assert not isinstance(model, FolderModel)
        with as_gguf(path, model.header):
            pass
    if not quiet and (other := other_base(path, model.name, model.header)):
        console.warn(other)
    return path, scale


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
