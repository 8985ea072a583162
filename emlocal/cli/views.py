"""A model that is loaded by a verb, and what people see of that."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal import console
from emlocal.loading import (
    MOST_PARALLEL,
    Loaded,
    check_parallel,
    load,
    load_for_batch,
)
from emlocal.settings.engine import EngineOptions
from emlocal.text import counted

if TYPE_CHECKING:
    from emlocal.backends.base import Backend
    from emlocal.generation.parallel import Speed
    from emlocal.methods.confidence import Calibration, Subject


@contextmanager
def open_backend(options: EngineOptions, *, sequences: int, quiet: bool) -> Iterator["Backend"]:
    """The model of these flags, for one prompt at a time; freed at the end. Raises as `loading.load` does."""
    _go_offline_if_asked(options)
    with console.progress(quiet) as progress:
        loaded = load(options, sequences=sequences, progress=progress, warn=_warn(quiet))
    with _open(loaded, quiet):
        yield loaded.backend


@contextmanager
def open_for_batch(options: EngineOptions, parallel: int | None, *, quiet: bool) -> Iterator[Loaded]:
    """The same for many sequences, each with room of its own: `parallel`, or as memory allows."""
    check_parallel(parallel)
    _go_offline_if_asked(options)
    with console.progress(quiet) as progress:
        loaded = load_for_batch(options, parallel, progress=progress, warn=_warn(quiet))
    with _open(loaded, quiet):
        yield loaded


def _go_offline_if_asked(options: EngineOptions) -> None:
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


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


def calibration_in(path: Path | None) -> "Calibration | None":
    """The calibration of a flag. Raises as `read_calibration` does."""
    if path is None:
        return None
    from emlocal.methods.confidence import read_calibration

    return read_calibration(path)


def warn_of_mismatch(calibration: "Calibration | None", subject: "Subject") -> None:
    """Say where a calibration was made for other answers than these."""
    differing = None if calibration is None else calibration.mismatch(subject)
    if differing is not None:
        console.warn(differing)


def choose_parallel(model: Loaded, asked: int | None, answers: int | None, *, quiet: bool) -> "Speed":
    """How many sequences at once, for so many answers at most, and how fast they are."""
    from emlocal.generation import parallel
    from emlocal.generation.parallel import Speed

    most = asked or MOST_PARALLEL
    if answers is not None:
        most = max(1, min(most, answers))
    with console.progress(quiet) as progress:
        progress("measuring how many sequences to run at once", 0, None)
        speeds = parallel.measure(model.backend, most)
    chosen = most if asked else parallel.best(speeds)
    speed = min(speeds, key=lambda s: abs(s.sequences - chosen))
    if not quiet:
        why = "as asked" if asked else "the fewest that are nearly the fastest"
        console.note(f"{counted(chosen, 'sequence')} at once, {why}: {speed.tokens_per_second:.0f} tok/s")
    return Speed(chosen, speed.tokens_per_second)
