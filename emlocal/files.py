"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from emlocal.errors import EmlocalError


@contextmanager
def atomic_writer(path: Path) -> Iterator[TextIO]:
    """A text file (UTF-8) that appears under its name when the block ends, or not at all if it raises.

    Raises EmlocalError where the file cannot be written (no such folder, read-only, disk full).
    """
    temporary: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as why:
        raise EmlocalError(f"cannot write {path}: {why.strerror or why}") from why
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
