"""What an output already holds when a run begins: whether it may be gone on with, and its rows."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from emlocal.batch.keys import Keys, Places
from emlocal.errors import UsageError
from emlocal.files import put_in_place, sync_folder
from emlocal.identity import differences
from emlocal.text import parse_json

_BUFFER = 1 << 20


class Existing:
    """The rows of an output, read once, line by line; the caller holds its lock."""

    def __init__(
        self,
        path: Path,
        target: Path,
        key_of: Callable[[Mapping[str, object]], str],
        is_error: Callable[[Mapping[str, object]], bool],
    ) -> None:
        """`path` is what people call the file, `target` where it really is."""
        self.path, self.target = path, target
        self.key_of, self.is_error = key_of, is_error
        self.done = Keys()
        self.rows = self.errors = self.end = 0
        self.repaired = self.retried = 0
        self._temporary = target.with_name(target.name + ".run.tmp")
        # One name, which the lock makes ours: what a killed process left is cleared away.
        self._temporary.unlink(missing_ok=True)

    def empty(self) -> None:
        if self.target.exists():
            with self.target.open("r+b") as file:
                file.truncate(0)
                os.fsync(file.fileno())

    def scan(self, *, drop_errors: bool) -> None:
        """Learn the rows, cut a torn end off, and drop the error rows if asked to.

        Raises UsageError for a broken line that has a whole one behind it: no crash of ours leaves that.
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
        """Put the rows into the order of these places, those without one last; False where they are so.

        The file is replaced in one step: whatever stops it, all rows are there, in the old order or the new.
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
        """Before the first row: the file's name, and a cut at its end."""
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
                    f"line {broken} of {self.path} is no JSON object, and whole rows follow it",
                    "mend or delete that line, or use another -o, or --restart to overwrite the file",
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
                f"line {number} of {self.path} is no row of emlocal batch",
                "delete that line, or use another -o, or --restart to overwrite the file",
            )
        if failed and drop_errors:
            self.retried += 1
            return
        if self.done.add(key) > 1:
            raise UsageError(
                f"line {number} of {self.path} repeats the key {key!r} of a line before it",
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
        """A file of these lines in the output's place."""
        try:
            with self._temporary.open("wb", buffering=_BUFFER) as new:
                new.writelines(lines)
                self.end = new.tell()
            shutil.copymode(self.target, self._temporary)
            put_in_place(self._temporary, self.target)
        finally:
            self._temporary.unlink(missing_ok=True)


def check_kind(path: Path, target: Path) -> None:
    """Raises UsageError where no file of rows can be."""
    if target.is_symlink():  # though all links were followed
        raise UsageError(f"{path} is a link that leads back to itself", "name another file with -o")
    if target.is_dir():
        raise UsageError(f"{path} is a folder, not an output file", "name a file in it")
    if target.exists() and not target.is_file():
        raise UsageError(
            f"{path} is a pipe or a device: a run that is to be resumed needs a regular file",
            "name a file with -o",
        )
    if not target.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {target.parent}", "create it first")


def check_settings(path: Path, old: Mapping[str, object] | None, new: Mapping[str, object]) -> None:
    """Raises UsageError where an output with rows was not made with these settings (None: not by us)."""
    if old is None:
        raise UsageError(
            f"{path} exists and is no output of emlocal",
            "use another -o, or --restart to overwrite it",
        )
    if differing := differences(old, new):
        raise UsageError(
            f"{path} was begun with other settings: {differing}",
            "run it with the settings it was begun with, or use another -o, or --restart to overwrite it",
        )


def _row(line: bytes) -> dict[str, object] | None:
    """The object in a line; None where there is none, or no end of line."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
