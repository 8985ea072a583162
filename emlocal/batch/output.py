"""The manifest beside an output (`OUTPUT.run`), and the rows that an output holds when a run begins.

The manifest says which settings the output was made with, and which process is writing it. Its first line,
`{"format": …, "settings": {…}}`, is written once and is durable before the output gets its first row.

A process that writes the output holds a lock on the manifest and names itself in a second line. The system
releases the lock when the process ends, for whatever reason. The manifest is never deleted or replaced,
because the lock belongs to the file and not to its name.

`Existing` reads the rows of an output and says whether a run can continue it.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from emlocal.batch.keys import Keys, Places
from emlocal.errors import EmlocalError, UsageError
from emlocal.files import put_in_place, sync_folder
from emlocal.identity import differences
from emlocal.text import parse_json

if sys.platform == "win32":
    import msvcrt

    BINARY = os.O_BINARY
else:
    import fcntl

    BINARY = 0

FORMAT = "emlocal-batch-1"
_LOCKED_BYTE, _LOCKED_BYTE_OF_OUTPUT = 1 << 30, 1 << 62  # for Windows; other systems lock the whole file
_START = json.dumps({"format": FORMAT}).encode()[:-1]


class Manifest:
    """An open, locked manifest. `settings` is its content, or None if it is empty or was cut short."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        content = _content(descriptor)
        if not _START.startswith(content[: len(_START)]):
            raise UsageError(
                f"{path} exists and was not written by this emlocal (format {FORMAT})",
                "move it, or use another -o",
            )
        self.settings = _settings(content)

    @classmethod
    def lock(cls, output: Path, called: Path) -> "Manifest":
        """Opens and locks the manifest of an output; creates it if needed.

        `called` is the output's name in messages. Raises EmlocalError if another process holds the lock,
        UsageError if the file is not a manifest, and OSError if the system refuses.
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
        """Stores the settings durably.

        Only for an output without rows: a crash here loses the old settings.
        """
        os.ftruncate(self._descriptor, 0)
        self._write_at(0, {"format": FORMAT, "settings": settings})
        os.fsync(self._descriptor)
        sync_folder(self._path.parent)
        self.settings = dict(settings)

    def sign(self) -> None:
        """Records the number of this process, for the error message of a second one."""
        start = self._cut_signature()
        self._write_at(start, {"process": os.getpid()})

    def close(self) -> None:
        """Releases the output."""
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
    """Locks the output itself. It may have several names (hard links), each with its own manifest.

    Closing the descriptor releases the lock. Raises EmlocalError if another process holds it.
    """
    if not _lock(descriptor, _LOCKED_BYTE_OF_OUTPUT):
        raise EmlocalError(
            f"{called} is being written by another emlocal, under another name of the same file",
            "wait for it to end, or use another -o",
        )


def _content(descriptor: int) -> bytes:
    """Returns the whole file, a few kilobytes.

    A power failure may leave NUL bytes at its end; they are cut.
    """
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
        process = ""  # the other process has the lock but has not signed yet
    return EmlocalError(
        f"{called} is being written by another emlocal{process}",
        "wait for it to end, or use another -o",
    )


if sys.platform == "win32":
    # Windows does not let others read locked bytes, so the lock is on a byte far behind the content.

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


_BUFFER = 1 << 20


class Existing:
    """The rows of an output, read once, line by line. The caller holds its lock."""

    def __init__(
        self,
        path: Path,
        target: Path,
        key_of: Callable[[Mapping[str, object]], str],
        is_error: Callable[[Mapping[str, object]], bool],
    ) -> None:
        """`path` is the file's name in messages, `target` its real location."""
        self.path, self.target = path, target
        self.key_of, self.is_error = key_of, is_error
        self.done = Keys()
        self.rows = self.errors = self.end = 0
        self.repaired = self.retried = 0
        self._temporary = target.with_name(target.name + ".run.tmp")
        # The lock protects this fixed name, so a file that a killed process left can be deleted.
        self._temporary.unlink(missing_ok=True)

    def empty(self) -> None:
        if self.target.exists():
            with self.target.open("r+b") as file:
                file.truncate(0)
                os.fsync(file.fileno())

    def scan(self, *, drop_errors: bool) -> None:
        """Reads the rows, cuts off a torn end and, on request, drops the error rows.

        Raises UsageError for a broken line with a whole one behind it: emlocal never leaves that, even if
        killed.
        """
        with self.target.open("r+b", buffering=_BUFFER) as file:
            for number, start, line, row in self._whole_lines(file):
                self._count(number, row, drop_errors)
                self.end = start + len(line)
            size = file.seek(0, os.SEEK_END)
            self.repaired = size - self.end
            if self.repaired:
                file.truncate(self.end)
        if self.retried:
            self._rewrite_without_errors()

    def rewrite_in_order(self, places: Places) -> bool:
        """Sorts the rows by these places, those without one last. Returns False if they already are sorted.

        The file is replaced in one step. If that is interrupted, all rows remain, in the old or the new
        order.
        """
        with self.target.open("rb") as old:
            in_order, last = True, -1
            for _, start, line, row in self._whole_lines(old):
                place = places.put(self.key_of(row), start, len(line))
                in_order, last = in_order and place >= last, place
            if in_order:
                return False
            self._replace(self._read(old, start, length) for start, length in places.in_order())
        return True

    def make_durable(self, descriptor: int) -> None:
        """Makes the file's name durable, and a cut at its end. Called before the first row is appended."""
        os.fsync(descriptor)
        sync_folder(self.target.parent)

    def _whole_lines(self, file: BinaryIO) -> Iterator[tuple[int, int, bytes, dict[str, object]]]:
        start, broken = 0, 0
        for number, line in enumerate(file, 1):
            row = _row(line)
            if row is None:
                broken = broken or number
            elif broken:
                raise UsageError(
                    f"line {broken} of {self.path} is not a JSON object, but whole rows follow it",
                    "fix or delete that line, or use another -o, or --restart to overwrite the file",
                )
            else:
                yield number, start, line, row
            start += len(line)

    def _count(self, number: int, row: dict[str, object], drop_errors: bool) -> None:
        try:
            key, failed = self.key_of(row), self.is_error(row)
        except (KeyError, TypeError):
            key, failed = None, False
        if not isinstance(key, str):
            raise UsageError(
                f"line {number} of {self.path} is not a row of emlocal batch",
                "delete that line, or use another -o, or --restart to overwrite the file",
            )
        if failed and drop_errors:
            self.retried += 1
            return
        if self.done.add(key) > 1:
            raise UsageError(
                f"line {number} of {self.path} repeats the key {key!r} of an earlier line",
                "delete one of the two, or use another -o, or --restart to overwrite the file",
            )
        self.rows += 1
        self.errors += failed

    def _rewrite_without_errors(self) -> None:
        with self.target.open("rb") as old:
            self._replace(line for _, _, line, row in self._whole_lines(old) if not self.is_error(row))

    @staticmethod
    def _read(file: BinaryIO, start: int, length: int) -> bytes:
        file.seek(start)
        return file.read(length)

    def _replace(self, lines: Iterable[bytes]) -> None:
        """Replaces the output by a file of these lines."""
        try:
            with self._temporary.open("wb", buffering=_BUFFER) as new:
                new.writelines(lines)
                self.end = new.tell()
            shutil.copymode(self.target, self._temporary)
            put_in_place(self._temporary, self.target)
        finally:
            self._temporary.unlink(missing_ok=True)


def check_kind(path: Path, target: Path) -> None:
    """Raises UsageError if the path cannot be an output file."""
    if target.is_symlink():  # still a link after all links were followed
        raise UsageError(f"{path} is a link to itself", "name another file with -o")
    if target.is_dir():
        raise UsageError(f"{path} is a folder, not an output file", "name a file in that folder")
    if target.exists() and not target.is_file():
        raise UsageError(
            f"{path} is a pipe or a device; a resumable run needs a regular file",
            "name a file with -o",
        )
    if not target.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {target.parent}", "create it first")


def check_settings(path: Path, old: Mapping[str, object] | None, new: Mapping[str, object]) -> None:
    """Raises UsageError if an output with rows was made with other settings (None: not made by emlocal)."""
    if old is None:
        raise UsageError(
            f"{path} exists and is not an output of emlocal",
            "use another -o, or --restart to overwrite it",
        )
    if differing := differences(old, new):
        raise UsageError(
            f"{path} was started with other settings: {differing}",
            "use its own settings, or another -o, or --restart to overwrite it",
        )


def _row(line: bytes) -> dict[str, object] | None:
    """Returns the object in a line, or None for other JSON, broken JSON or a missing line end."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
