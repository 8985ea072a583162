"""What all readers of files to draw need."""

import math
from collections.abc import Sequence
from pathlib import Path

from emlocal.errors import EmlocalError, UsageError
from emlocal.text import harmless


def read_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises UsageError where there is no such file, EmlocalError where it cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is not there") from None
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why


def finite(value: object) -> float | None:
    """The number that a JSON value is; None where it is none, or none that has a place on an axis."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def labels(paths: Sequence[Path], what: str) -> list[str]:
    """The last parts of the paths, as many as make them different. `what` they are, for the error.

    Raises UsageError for a path that is given twice.
    """
    whole = [path.resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise UsageError(f"{what} is given twice", "give each once")
    # links go by their own names, as they were given
    named = [path.resolve() if ".." in path.parts else path.absolute() for path in paths]
    found = [path.name for path in named]
    for parts in range(2, max(len(path.parts) for path in named) + 1):
        if len(set(found)) == len(found):
            break
        found = ["/".join(path.parts[-parts:]) for path in named]
    return [harmless(label) for label in found]
