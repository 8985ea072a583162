"""From flags to a loaded model, with the one line that says which and why."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal import console
from emlocal.backends.context import context_length
from emlocal.backends.options import LoadOptions
from emlocal.backends.select import load_backend, select_backend
from emlocal.cancel import interruptible
from emlocal.cli.options import EngineOptions
from emlocal.errors import UsageError
from emlocal.models.gguf import read_adapter_header
from emlocal.models.gguf_header import GGUFHeader
from emlocal.models.memory import KV_TYPE_BYTES, available, check_memory, estimate
from emlocal.models.resolve import LocalModel, resolve

if TYPE_CHECKING:
    from emlocal.backends.base import Backend

BATCH_CONTEXT = 2048
"""Tokens of a sequence in a batch, where nobody says: each has this room to itself."""
MOST_PARALLEL = 16
"""Sequences in a batch, where nobody says: on CPUs more gain little (docs/performance.md)."""
_LEFT_FREE = 0.9  # of the free memory, a batch takes no more than this without being asked


@dataclass(frozen=True)
class Opened:
    """A loaded model, and the file that it came from."""

    backend: "Backend"
    model: LocalModel
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
    name, reason = select_backend(str(options.backend or "auto"))
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    with console.progress(quiet) as progress:
        model = resolve(options.model, offline=bool(options.offline), progress=progress)
    adapters = tuple(_adapter(text, model) for text in options.adapter or [])
    trained = model.header.context_length
    context = context_length(options.context or (None if shared else min(trained, BATCH_CONTEXT)), trained)
    kv_type = str(options.kv_type or "f16")
    bytes_each = KV_TYPE_BYTES[kv_type]
    if not shared:
        from emlocal.generation.scheduler import SPARE_SEQUENCES as SPARE

        sequences = SPARE + (sequences or _as_many_as_fit(model.header, context, bytes_each, SPARE))
    assert sequences is not None
    check_memory(model.header, context, kv_type_bytes=bytes_each, n_seqs=1 if shared else sequences)
    load = LoadOptions(
        context=context,
        sequences=sequences,
        shared=shared,
        threads=options.threads,
        kv_type=kv_type,  # type: ignore[arg-type]  # KVChoice has the same words
        adapters=adapters,
    )
    with interruptible() as cancelled:  # llama.cpp calls back while it loads: nothing may be raised there
        backend = load_backend(name, model, load, meanwhile=partial(_prepare, model.header))
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


def _prepare(header: GGUFHeader) -> None:
    """Import and compile what the first answer will need."""
    import emlocal.answers
    import emlocal.generation.prompt  # noqa: F401
    from emlocal.models.templates import prepare

    prepare(header.chat_template)


def _as_many_as_fit(header: GGUFHeader, context: int, bytes_each: float, spare: int) -> int:
    """Parallel sequences for which there is memory, at least 1, with `spare` ones besides."""
    for n in range(MOST_PARALLEL, 1, -1):
        needed = estimate(header, context, kv_type_bytes=bytes_each, n_seqs=n + spare)
        if needed <= _LEFT_FREE * available():
            return n
    return 1


def _check(options: EngineOptions) -> None:
    if options.context is not None and options.context < 16:
        raise UsageError(f"--context is {options.context}; it must be at least 16 tokens")
    cores = os.cpu_count() or 1
    if options.threads is not None and not 1 <= options.threads <= 4 * cores:
        raise UsageError(f"--threads is {options.threads}; it must be between 1 and {4 * cores} here")


def _adapter(text: str, model: LocalModel) -> tuple[Path, float]:
    """FILE or FILE=SCALE, the file checked against the model."""
    path, scale = Path(text), 1.0
    if not path.exists() and "=" in text:
        name, _, number = text.rpartition("=")
        try:
            path, scale = Path(name), float(number)
        except ValueError:
            raise UsageError(f"--adapter is {text!r}; after '=' comes the scale, a number") from None
    if not path.exists():
        raise UsageError(f"there is no adapter {path}")
    if path.is_dir() or path.suffix != ".gguf":
        raise UsageError(f"{path} is no GGUF adapter, and the llama.cpp engine loads no other kind")
    read_adapter_header(path, model.header)
    return path, scale
