"""The output of a batch run. It appends each row whole or not at all, so a killed run can be resumed.

Failures and their effects:

- A process that dies leaves at most one torn row at the end. The next `Journal.open` cuts it off.
- A write that fails (disk full) is undone at once.
- After a power failure, rows of the last second may be missing or torn. The next run makes them again.

Durable rows are never overwritten; `retry_errors` and `put_in_order` replace the whole file in one step.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from emlocal.batch.keys import Keys, Places
from emlocal.batch.output import (
    BINARY,
    Existing,
    Manifest,
    check_kind,
    check_settings,
    lock_output,
    manifest_path,
)
from emlocal.errors import EmlocalError

_SECONDS_BETWEEN_SYNCS = 1.0
_HINT = "free some space, then run the same command to resume"

Row = Mapping[str, object]


class Journal:
    """An output file to which one process appends rows. It knows which rows it holds.

    `done` holds the keys of its rows; `rows` and `errors` count them. `repaired` is the number of torn bytes
    cut from its end on opening, `retried` the number of dropped error rows. Not thread-safe.
    """

    def __init__(self, path: Path, manifest: Manifest, descriptor: int, held: Existing) -> None:
        """Stores its arguments. Use `Journal.open`, which checks and repairs the file first."""
        self.path = path
        self.done: Keys = held.done
        self.rows, self.errors = held.rows, held.errors
        self.repaired, self.retried = held.repaired, held.retried
        self._key_of, self._is_error = held.key_of, held.is_error
        self._manifest = manifest
        self._held = held
        self._descriptor = descriptor
        self._end = self._durable_end = held.end
        self._durable_rows = held.rows
        self._synced_at = time.monotonic()

    @classmethod
    def open(
        cls,
        path: Path,
        settings: Mapping[str, object],
        *,
        key_of: Callable[[Row], str],
        is_error: Callable[[Row], bool],
        restart: bool = False,
        retry_errors: bool = False,
    ) -> Self:
        """Creates an output, or resumes one that was made with the same settings.

        `key_of` and `is_error` may raise KeyError or TypeError for a row that emlocal did not write.
        `restart` deletes all rows, whoever wrote them; `retry_errors` deletes only the error rows.

        Raises UsageError for an output that cannot be resumed (a folder, another program's file, other
        settings, a broken line in its middle). Raises EmlocalError if another process uses the output, or for
        an error of the operating system.
        """
        # follow links: the manifest and the lock belong to the file itself
        target = Path(os.path.realpath(path))
        check_kind(path, target)
        with ExitStack() as opened, _system_errors(path):
            if not restart and _size(target) and not manifest_path(target).exists():
                # check before leaving a manifest beside another program's file
                check_settings(path, None, settings)
            if target.exists() and not manifest_path(target).exists():
                # check before leaving a manifest beside an output that is in use
                with target.open("rb+") as file:
                    lock_output(file.fileno(), path)
            manifest = Manifest.lock(target, path)
            opened.callback(manifest.close)
            descriptor = _open_locked(target, path)
            opened.callback(lambda: os.close(descriptor))
            held = Existing(path, target, key_of, is_error)
            opened.callback(held.done.close)
            if restart:
                held.empty()
            if _size(target):
                check_settings(path, manifest.settings, settings)
                held.scan(drop_errors=retry_errors)
            else:
                manifest.write(settings)
            manifest.sign()
            if held.retried:  # the file was replaced by a new one
                os.close(descriptor)
                descriptor = _open_locked(target, path)
            held.make_durable(descriptor)
            journal = cls(path, manifest, descriptor, held)
            opened.pop_all()
        return journal

    def append(self, row: Row) -> None:
        """Appends a row, whole or not at all, and makes the rows durable about once a second.

        Raises EmlocalError if the row cannot be written; the journal is then closed. Raises ValueError if the
        key already exists, or if the row contains NaN, which JSON cannot express.
        """
        key = self._key_of(row)
        if key in self.done:
            raise ValueError(f"a row with the key {key!r} is already in {self.path}")
        self._write(_line(row))
        self.rows += 1
        self.errors += self._is_error(row)
        self.done.add(key)
        self.sync(_SECONDS_BETWEEN_SYNCS)

    def sync(self, after_seconds: float = 0.0) -> None:
        """Makes all rows durable if at least `after_seconds` have passed since the last sync.

        `append` calls it. A loop that may wait long for its next row can call it too.
        """
        now = time.monotonic()
        if self._end == self._durable_end or now - self._synced_at < after_seconds:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as why:
            # After a failed fsync the system may have dropped the rows since the last sync, though it still
            # shows them.
            raise self._failure(why, self._durable_end, self._durable_rows) from why
        self._durable_end, self._durable_rows, self._synced_at = self._end, self.rows, now

    def put_in_order(self, places: Places) -> bool:
        """Sorts the rows into the order of the input lines; returns False if they already are.

        Rows that were made again stand at the end until then. Raises EmlocalError if the file cannot be
        written; the rows are then unchanged.
        """
        self.sync()
        with _system_errors(self.path):
            if not self._held.rewrite_in_order(places):
                return False
            os.close(self._descriptor)
            self._descriptor = -1
            self._descriptor = _open_locked(self._held.target, self.path)
        return True

    def close(self) -> None:
        """Makes all rows durable and releases the output. Raises EmlocalError as `append` does."""
        if self._descriptor >= 0:
            self.sync()
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            self._end += len(line)
        except OSError as why:
            self._cut(self._end)
            self.sync()
            raise self._failure(why, self._end, self.rows) from why
        except BaseException:  # for example Ctrl-C between two parts of a row
            self._cut(self._end)
            raise

    def _failure(self, why: OSError, end: int, rows: int) -> EmlocalError:
        """Closes the journal after a failed write or sync; returns the error with the number of safe rows."""
        self._cut(end)
        self.rows = rows
        self._release()
        return EmlocalError(f"cannot write {self.path}: {why.strerror or why}; {rows} rows are safe", _HINT)

    def _cut(self, end: int) -> None:
        with suppress(OSError):  # if this fails, a torn row stays at the end; the next opening cuts it
            os.ftruncate(self._descriptor, end)

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        with suppress(OSError):  # the rows are durable, or their loss has been reported
            os.close(descriptor)
        self.done.close()
        self._manifest.close()


def _line(row: Row) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        # UTF-8 cannot encode half a surrogate pair, but JSON can escape it: the row reads back unchanged.
        return json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _open_locked(target: Path, called: Path) -> int:
    """Opens the output for appending and locks it under all its names; returns the descriptor."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND | BINARY, 0o666)
    try:
        lock_output(descriptor, called)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _size(target: Path) -> int:
    return target.stat().st_size if target.exists() else 0


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as why:
        raise EmlocalError(f"cannot write {path}: {why.strerror or why}") from why
