"""Files that are whole or not there."""

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from emlocal.errors import EmlocalError


@contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """A text file (UTF-8) that appears under its name when the block ends, or not at all if it raises.

    A symbolic link is followed; what is no regular file (a pipe, a device) is written to as it is.

    Raises EmlocalError where the file cannot be written (no such folder, read-only, disk full).
    """
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_file():
            with path.open("w", encoding="utf-8") as stream:
                yield stream
            return
        target = path.resolve()
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_usual_mode())
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as why:
        raise EmlocalError(f"cannot write {path}: {why.strerror or why}") from why
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make durable which files the folder has: a new name can be lost in a power failure until then."""
    if sys.platform != "win32":  # which opens no folders, and whose file system journals names by itself
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as why:
            if why.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
                raise
        finally:
            os.close(descriptor)


def _usual_mode() -> int:
    """The permissions that a new file gets; the system tells its mask only to who sets it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask
