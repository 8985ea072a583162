"""Where emlocal keeps its own files. Models of the hub are not here: those stay in the Hugging Face cache.

What every download needs: a way to report progress, room on the disk, and plain words for disk errors.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from emlocal.errors import ModelError
from emlocal.text import human_size


def cache_dir() -> Path:
    """What can be fetched again: the starter model, weights converted for engines. EMLOCAL_CACHE_DIR."""
    return _chosen("EMLOCAL_CACHE_DIR") or platformdirs.user_cache_path("emlocal", appauthor=False)


def config_dir() -> Path:
    """What people write: config.toml. EMLOCAL_CONFIG_DIR."""
    return _chosen("EMLOCAL_CONFIG_DIR") or platformdirs.user_config_path("emlocal", appauthor=False)


def data_dir() -> Path:
    """What emlocal writes and nothing can bring back: conversations, adapters. EMLOCAL_DATA_DIR."""
    return _chosen("EMLOCAL_DATA_DIR") or platformdirs.user_data_path("emlocal", appauthor=False)


def _chosen(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else None


Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the bytes done, and the bytes in all (None: not known)."""


def silent(label: str, done: int, total: int | None) -> None:
    """A Progress that says nothing."""


def nearest(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise ModelError if `folder` (which need not exist yet) has fewer than `needed` bytes free."""
    free = shutil.disk_usage(nearest(folder)).free
    if free < needed:
        raise ModelError(
            f"{what} needs {human_size(needed)} of disk, but {folder} has {human_size(free)} free",
            hint="free some space, or remove models you no longer use: emlocal models rm NAME",
        )


@contextmanager
def disk_errors(folder: Path, variable: str) -> Iterator[None]:
    """Turn OSErrors of writing under `folder` (moved by `variable` of the environment) into ModelErrors."""
    try:
        yield
    except OSError as error:
        move = f"or keep models elsewhere: {variable}=/another/folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(f"the disk of {folder} is full", hint=f"free some space, {move}") from error
        why = error.strerror or str(error)
        raise ModelError(f"cannot write to {folder}: {why}", hint=f"make it writable, {move}") from error
