"""Headers that were checked before: to walk through 151,936 tokens and their merges again takes 50 ms.

What is remembered is the header's own content (BLAKE2b of all its bytes), not a date or a size: a file that
changed is another header, however quickly it changed. All checks but those of the vocabulary are made each
time. Without this file, or with a damaged one, everything is checked.

Beside it: the models that came through a trial in a process of their own (backends/llama_cpp/loading.py).
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from emlocal import __version__
from emlocal.errors import EmlocalError, ModelError
from emlocal.files import atomic_writer
from emlocal.models.gguf.header import MAX_HEADER_BYTES, ArrayRef, GGUFHeader
from emlocal.models.gguf.types import STRING
from emlocal.models.paths import cache_dir
from emlocal.models.regular import open_regular

CHECKS = 1  # one more whenever the reader or the checks of the vocabulary change within a version
LARGE = 10_000  # tokens; fewer are checked in no time
_HEADERS, _TRIALS = "checked-headers.json", "tried-models.json"
_MOST = 64  # entries of each


class Known(NamedTuple):
    """A header whose vocabulary was checked."""

    data: bytearray
    """All of it: these very bytes are to be read, not the file again."""
    extents: Mapping[str, int]
    """Bytes of each array of strings, by metadata key."""


def recall(path: Path) -> Known | None:
    """The header of this file, if one with the same bytes was remembered."""
    entry = _entries(_HEADERS).get(str(path.absolute()))
    if not isinstance(entry, dict):
        return None
    length, extents, digest = (entry.get(name) for name in ("length", "extents", "digest"))
    if not isinstance(length, int) or not 0 < length <= MAX_HEADER_BYTES or not isinstance(extents, dict):
        return None
    try:
        with open_regular(path) as file:
            if length > file.seek(0, 2):
                return None
            file.seek(0)
            data = bytearray(file.read(length))
    except (OSError, ModelError):  # whoever reads the file next says why
        return None
    return Known(data, extents) if _digest(data, extents) == digest else None


def remember(header: GGUFHeader, data: bytes | bytearray) -> None:
    """Keep that this header, of which `data` are the bytes, passed every check."""
    if header.vocab_size < LARGE:
        return
    extents = {
        key: value.nbytes
        for key, value in header.metadata.items()
        if isinstance(value, ArrayRef) and value.element_type == STRING
    }
    entries = _entries(_HEADERS)
    entries.pop(str(header.path.absolute()), None)
    entry = {"length": len(data), "extents": extents, "digest": _digest(data, extents)}
    _keep(_HEADERS, entries | {str(header.path.absolute()): entry})


def came_through(key: str) -> bool:
    """Whether the model of this name for its contents came through a trial."""
    return _entries(_TRIALS).get(key) is True


def remember_trial(key: str) -> None:
    """Keep that it did."""
    _keep(_TRIALS, _entries(_TRIALS) | {key: True})


def _keep(name: str, entries: dict[str, Any]) -> None:
    """Write the latest entries."""
    file = cache_dir() / name
    with suppress(EmlocalError, OSError):  # a folder that cannot be written to: checked again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(file) as stream:
            json.dump(dict(list(entries.items())[-_MOST:]), stream)


def _entries(name: str) -> dict[str, Any]:
    """What is remembered in a file of the cache; the oldest first."""
    try:
        found = json.loads((cache_dir() / name).read_text("utf-8"))
    except (OSError, ValueError):  # none yet, or damaged
        return {}
    return found if isinstance(found, dict) else {}


def _digest(data: bytes | bytearray, extents: Mapping[str, int]) -> str:
    """Of the header, of what is remembered of it, and of the checks that it passed."""
    import hashlib

    said = json.dumps([__version__, CHECKS, extents], sort_keys=True)
    return hashlib.blake2b(data, digest_size=32, key=hashlib.blake2b(said.encode()).digest()).hexdigest()
