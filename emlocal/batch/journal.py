"""The output of a batch run: rows are appended, each whole or not at all, and a killed run goes on.

What can happen, and what becomes of it: a process that dies leaves at most one torn row at the end, which
the next `Journal.open` cuts off; a write that fails (disk full) is taken back at once; after a power failure
rows of the last second may be missing or torn, and are made again. What was durable is never written to
again, except by `retry_errors`, which replaces the whole file in one step.
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
_HINT = "free some space and run the same command again: it goes on where it stopped"

Row = Mapping[str, object]


class Journal:
    """An output file that one process appends rows to, and that knows what it holds.

    `done` has the keys of its rows, `rows` and `errors` count them; `repaired` is how many torn bytes were
    cut from its end on opening, `retried` how many error rows were dropped. Not for several threads.
    """

    def __init__(self, path: Path, manifest: Manifest, descriptor: int, held: Existing) -> None:
        """For `Journal.open`, which has checked and repaired the file."""
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
        """Begin an output, or go on with one that the same settings made.

        `key_of` and `is_error` may raise KeyError or TypeError for a row that is none of theirs. With
        `restart` an output loses its rows, whoever made it; with `retry_errors` its error rows only.

        Raises UsageError for an output that cannot be meant (a folder, another program's, other settings,
        a broken line in its middle), EmlocalError where it is in use or the system says no.
        """
        target = Path(os.path.realpath(path))  # a link is followed: it shares manifest and lock with its file
        check_kind(path, target)
        with ExitStack() as opened, _system_errors(path):
            if not restart and _size(target) and not manifest_path(target).exists():
                check_settings(path, None, settings)  # before a manifest is left beside a stranger's file
            if target.exists() and not manifest_path(target).exists():
                with target.open("rb+") as file:  # before a manifest is left beside another's output
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
            if held.retried:  # the file is another one now
                os.close(descriptor)
                descriptor = _open_locked(target, path)
            held.make_durable(descriptor)
            journal = cls(path, manifest, descriptor, held)
            opened.pop_all()
        return journal

    def append(self, row: Row) -> None:
        """Add a row at the end, whole or not at all; now and then make what there is durable.

        Raises EmlocalError where the row cannot be written; the journal is then closed. ValueError for a
        row that must not be written: its key is there already, or it holds a NaN, which JSON has not.
        """
        key = self._key_of(row)
        if key in self.done:
            raise ValueError(f"a row with the key {key!r} is in {self.path} already")
        self._write(_line(row))
        self.rows += 1
        self.errors += self._is_error(row)
        self.done.add(key)
        self.sync(_SECONDS_BETWEEN_SYNCS)

    def sync(self, after_seconds: float = 0.0) -> None:
        """Make all rows durable, if so much time has passed since that was last done.

        `append` does it; a loop that may wait long for its next row can do it besides.
        """
        now = time.monotonic()
        if self._end == self._durable_end or now - self._synced_at < after_seconds:
            return
        try:
            os.fsync(self._descriptor)
        except OSError as why:
            # The system may have dropped the rows since the last sync while it still shows them.
            raise self._failure(why, self._durable_end, self._durable_rows) from why
        self._durable_end, self._durable_rows, self._synced_at = self._end, self.rows, now

    def put_in_order(self, places: Places) -> bool:
        """Bring the rows into the order of the lines, where they are not: rows that were made again stand at
        the end until then. Raises EmlocalError where it cannot be written; the rows are then as they were."""
        self.sync()
        with _system_errors(self.path):
            if not self._held.rewrite_in_order(places):
                return False
            os.close(self._descriptor)
            self._descriptor = -1
            self._descriptor = _open_locked(self._held.target, self.path)
        return True

    def close(self) -> None:
        """Make all rows durable and give the output free; raises EmlocalError as `append` does."""
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
        except BaseException:  # Ctrl-C between two parts of a row
            self._cut(self._end)
            raise

    def _failure(self, why: OSError, end: int, rows: int) -> EmlocalError:
        """The error of a failed write or sync, after which these rows are left and the journal is closed."""
        self._cut(end)
        self.rows = rows
        self._release()
        return EmlocalError(f"cannot write {self.path}: {why.strerror or why}; {rows} rows are safe", _HINT)

    def _cut(self, end: int) -> None:
        with suppress(OSError):  # what stays is a torn end, and the next opening cuts it
            os.ftruncate(self._descriptor, end)

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        with suppress(OSError):  # its rows are durable, or their loss has been reported
            os.close(descriptor)
        self.done.close()
        self._manifest.close()


def _line(row: Row) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        # Half a surrogate pair is no UTF-8, but JSON has an escape for it: the row reads back as it was.
        return json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _open_locked(target: Path, called: Path) -> int:
    """A descriptor that appends to the output, which is then locked under all its names."""
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
