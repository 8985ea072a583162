"""A model that is loaded by a verb, and what people see of that."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from emlocal import console
from emlocal.cli.options import EngineOptions
from emlocal.loading import Loaded, Wanted, adapter_and_scale, check_parallel, load, load_for_batch

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.backends.options import KVType


@contextmanager
def open_backend(options: EngineOptions, *, sequences: int, quiet: bool) -> Iterator["Backend"]:
    """The model of these flags, for one prompt at a time; freed at the end. Raises as `loading.load` does."""
    wanted = _wanted(options)
    with console.progress(quiet) as progress:
        loaded = load(wanted, sequences=sequences, progress=progress, warn=_warn(quiet))
    with _open(loaded, quiet):
        yield loaded.backend


@contextmanager
def open_for_batch(options: EngineOptions, parallel: int | None, *, quiet: bool) -> Iterator[Loaded]:
    """The same for many sequences, each with room of its own: `parallel`, or as memory allows."""
    check_parallel(parallel)
    wanted = _wanted(options)
    with console.progress(quiet) as progress:
        loaded = load_for_batch(wanted, parallel, progress=progress, warn=_warn(quiet))
    with _open(loaded, quiet):
        yield loaded


def _wanted(options: EngineOptions) -> Wanted:
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    kv_type: KVType | None = str(options.kv_type) if options.kv_type else None  # type: ignore[assignment]
    return Wanted(
        options.model,
        str(options.backend or "auto"),
        tuple(map(adapter_and_scale, options.adapter or [])),
        options.context,
        options.threads,
        kv_type,
        bool(options.offline),
    )


def _warn(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else console.warn


@contextmanager
def _open(loaded: Loaded, quiet: bool) -> Iterator[None]:
    if not quiet:
        console.note(loaded.describe())
    try:
        yield
    finally:
        loaded.backend.close()
