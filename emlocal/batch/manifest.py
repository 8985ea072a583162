"""The file beside an output (`OUTPUT.run`) that says which settings it was made with, and who writes it now.

Its first line, `{"format": …, "settings": {…}}`, is written once and durable before the output has a row.
While a process writes the output it holds a lock on this file, and a second line names the process. The
system frees the lock when the process ends, however it ends; the file is never deleted or replaced,
since a lock is on the file and not on its name.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from emlocal.errors import EmlocalError, UsageError
from emlocal.files import sync_folder
from emlocal.text import parse_json

if sys.platform == "win32":
    import msvcrt

    BINARY = os.O_BINARY
else:
    import fcntl

    BINARY = 0

FORMAT = "emlocal-batch-1"
_LOCKED_BYTE, _LOCKED_BYTE_OF_OUTPUT = 1 << 30, 1 << 62  # on Windows; elsewhere the whole file is locked
_START = json.dumps({"format": FORMAT}).encode()[:-1]


class Manifest:
    """An open, locked manifest. `settings` is what it holds: None where that is nothing, or was cut short."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        content = _content(descriptor)
        if not _START.startswith(content[: len(_START)]):
            raise UsageError(
                f"{path} exists and is not a file of this emlocal (format {FORMAT})",
                "move it away, or use another -o",
            )
        self.settings = _settings(content)

    @classmethod
    def lock(cls, output: Path, called: Path) -> "Manifest":
        """The manifest of this output, created where there is none; `called` is the output's name for people.

        Raises EmlocalError where another process has it, UsageError where it is somebody else's file,
        OSError where the system says no.
        """
        path = manifest_path(output)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
        try:
            if not _lock(descriptor, _LOCKED_BYTE):
                raise _in_use(called, descriptor)
            return cls(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def write(self, settings: Mapping[str, object]) -> None:
        """Take these settings, durably. Only for an output without rows: a crash here loses the old ones."""
        os.ftruncate(self._descriptor, 0)
        self._write_at(0, {"format": FORMAT, "settings": settings})
        os.fsync(self._descriptor)
        sync_folder(self._path.parent)
        self.settings = dict(settings)

    def sign(self) -> None:
        """Name this process as the one that writes: for the message that a second one gives."""
        start = self._cut_signature()
        self._write_at(start, {"process": os.getpid()})

    def close(self) -> None:
        """Give the output free."""
        if self._descriptor < 0:
            return
        try:
            if self.settings is not None:
                self._cut_signature()
            _unlock(self._descriptor, _LOCKED_BYTE)
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def _cut_signature(self) -> int:
        start = _content(self._descriptor).find(b"\n") + 1
        os.ftruncate(self._descriptor, start)
        return start

    def _write_at(self, start: int, value: Mapping[str, object]) -> None:
        os.lseek(self._descriptor, start, os.SEEK_SET)
        rest = memoryview(json.dumps(value).encode() + b"\n")
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]


def manifest_path(output: Path) -> Path:
    return output.with_name(output.name + ".run")


def lock_output(descriptor: int, called: Path) -> None:
    """Lock the output itself, which may have several names (hard links), each with a manifest of its own.

    The lock goes when the descriptor is closed. Raises EmlocalError where another process has it.
    """
    if not _lock(descriptor, _LOCKED_BYTE_OF_OUTPUT):
        raise EmlocalError(
            f"{called} is being written by another emlocal, under another name of the same file",
            "wait for it to end, or use another -o",
        )


def _content(descriptor: int) -> bytes:
    """The whole file: a few kilobytes. NUL bytes at its end are what a power failure leaves."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb", closefd=False) as file:
        return file.read().rstrip(b"\0")


def _settings(content: bytes) -> dict[str, object] | None:
    first, end, _ = content.partition(b"\n")
    try:
        value = parse_json(first)
    except ValueError:
        return None
    if not end or not isinstance(value, dict) or value.get("format") != FORMAT:
        return None
    settings = value.get("settings")
    return settings if isinstance(settings, dict) else None


def _in_use(called: Path, descriptor: int) -> EmlocalError:
    try:
        process = f" (process {int(parse_json(_content(descriptor).splitlines()[1])['process'])})"
    except (ValueError, LookupError, TypeError, OSError):
        process = ""  # it has the lock and has not signed yet
    return EmlocalError(
        f"{called} is being written by another emlocal{process}",
        "wait for it to end, or use another -o",
    )


if sys.platform == "win32":
    # Windows forbids others to read what is locked, so the lock is on a byte far behind the content.

    def _lock(descriptor: int, byte: int) -> bool:
        os.lseek(descriptor, byte, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

    def _unlock(descriptor: int, byte: int) -> None:
        os.lseek(descriptor, byte, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:

    def _lock(descriptor: int, byte: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(descriptor: int, byte: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
