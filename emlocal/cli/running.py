"""What `batch` and `eval` do alike: know a run again, choose how many sequences to run at once."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal import console
from emlocal.settings import SamplingParams, describe_em, settings_of
from emlocal.words import counted

if TYPE_CHECKING:
    from emlocal.batch.run import BatchSettings
    from emlocal.cli.engine import Opened
    from emlocal.generation.parallel import Speed

_END_BYTES = 1 << 20  # of a model file, from either end


def identity_of(settings: "BatchSettings", model: "Opened") -> dict[str, object]:
    """What makes rows of two runs different, for the manifest: a resumed run must have the same."""
    from emlocal.models.adapters.reading import adapter_files

    plan = settings.plan
    return {
        "model": fingerprint(*model.model.files),
        "adapters": [[fingerprint(*adapter_files(path)), scale] for path, scale in model.adapters],
        **settings.method.identity(),
        "system": settings.system,
        "raw": settings.raw,
        "keep": settings.keep,
        "format": "openai" if settings.openai else "emlocal",
        "engine": f"{model.backend.name}, {model.backend.arithmetic}",
        "context": model.backend.context,
        "samples": plan.samples,
        "seed": plan.seed,
        "max-tokens": plan.max_tokens,
        "stop": list(plan.stop),
        "em": describe_em(plan.params.em),
        "sampling": {name: vars(plan.params)[name] for name in settings_of(SamplingParams)},
        "logit-bias": [list(pair) for pair in plan.params.logit_bias],
    }


def fingerprint(*files: Path) -> str:
    """A file's name, size, and a digest of its ends: enough to tell models apart, at once."""
    hashed = hashlib.blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            hashed.update(file.read(_END_BYTES))
            file.seek(-min(_END_BYTES, path.stat().st_size), os.SEEK_END)
            hashed.update(file.read())
    return f"{files[0].name}, {sum(f.stat().st_size for f in files):,} bytes, {hashed.hexdigest()}"


def choose_parallel(model: "Opened", asked: int | None, answers: int | None, *, quiet: bool) -> "Speed":
    """How many sequences at once, for so many answers at most, and how fast they are."""
    from emlocal.cli.engine import MOST_PARALLEL
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
