"""Batch runs on the engine without a model, for the tests beside this file."""

import io
import json
from collections.abc import Callable, Iterable
from typing import Any

from emlocal.backends.base import Backend
from emlocal.backends.fake import FakeBackend, hashed
from emlocal.batch.lines import read_lines
from emlocal.batch.run import Batch, BatchSettings
from emlocal.generation import Scheduler
from emlocal.generation.scheduler import SPARE_SEQUENCES
from emlocal.methods import Chosen
from emlocal.settings import Plan, SamplingParams

Row = dict[str, Any]


def engine(parallel: int, script: Callable = hashed, **options: Any) -> FakeBackend:
    return FakeBackend(script, sequences=parallel + SPARE_SEQUENCES, shared=False, **options)


def settings(
    method: Chosen | None = None, params: SamplingParams | None = None, **more: Any
) -> BatchSettings:
    """Makes settings as the command line does."""
    method = method or Chosen()
    plan = Plan(
        params or SamplingParams(temperature=1.0),
        more.pop("max_tokens", 24),
        more.pop("stop", ()),
        more.pop("seed", 0),
    )
    return BatchSettings(method.plan(plan), method, **more)


def batch(
    lines: Iterable[Any],
    how: BatchSettings | None = None,
    *,
    parallel: int = 3,
    script: Callable = hashed,
    done: Any = None,
    **options: Any,
) -> Batch:
    """Makes a run over lines; each is a value to be written as JSON, or raw bytes."""
    raw = b"".join((v if isinstance(v, bytes) else json.dumps(v).encode()) + b"\n" for v in lines)
    return batch_on(
        engine(parallel, script, **options), read_lines(io.BytesIO(raw)), how or settings(), parallel, done
    )


def batch_on(backend: Backend, lines: Any, how: BatchSettings, parallel: int, done: Any = None) -> Batch:
    """Makes a run over lines that are already parsed."""
    return Batch(backend, lines, how, runner=Scheduler(backend, parallel), done=done)


def rows(*args: Any, **kwargs: Any) -> list[Row]:
    """Returns all rows of a run; checks that no sequence stays in use and no row has a NaN."""
    running = batch(*args, **kwargs)
    found = list(running.rows())
    assert running.runner.idle
    running.runner.close()
    assert running._backend.open() == 0
    json.dumps(found, allow_nan=False)
    return found


def row(*args: Any, **kwargs: Any) -> Row:
    """Returns the only row."""
    (only,) = rows(*args, **kwargs)
    return only


def timeless(found: Iterable[Row]) -> list[Row]:
    """Returns rows by name, without fields that differ from run to run."""
    left_out = ("seconds", "cached_tokens", "forward_passes")  # the last two depend on what else runs
    kept = [{k: v for k, v in each.items() if k not in left_out} for each in found]
    return sorted(kept, key=lambda each: each["key"])
