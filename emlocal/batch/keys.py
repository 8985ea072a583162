"""Sets of strings on disk: a million keys need no more memory than ten."""

import sqlite3
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from emlocal.errors import EmlocalError

_CACHE_KIB = 4096


class Keys:
    """A set of strings that counts how often each was added, in a temporary file that deletes itself.

    The file has no name, so not even kill -9 leaves it behind. Only one thread may use it, as with any sqlite
    connection.
    """

    def __init__(self) -> None:
        # The empty name is sqlite's temporary database. It goes to disk once it outgrows the cache. Nothing
        # in it needs saving, so there is no journal, and one transaction stays open.
        self._database = sqlite3.connect("", isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            f"PRAGMA cache_size = -{_CACHE_KIB}",
            "CREATE TABLE keys (key BLOB PRIMARY KEY, times INTEGER NOT NULL) WITHOUT ROWID",
            "BEGIN",
        ):
            self._database.execute(statement)
        self._count = 0

    def add(self, key: str) -> int:
        """Adds a key; returns how often it has been added, 1 the first time."""
        stored = _stored(key)
        try:
            if self._database.execute("INSERT OR IGNORE INTO keys VALUES (?, 1)", (stored,)).rowcount == 1:
                self._count += 1
                return 1
            # RETURNING would do this in one statement, but Red Hat 9 has sqlite 3.34, which lacks it.
            self._database.execute("UPDATE keys SET times = times + 1 WHERE key = ?", (stored,))
            found = self._database.execute("SELECT times FROM keys WHERE key = ?", (stored,))
            times: int = found.fetchone()[0]
        except sqlite3.OperationalError as why:
            raise _failure(why) from why
        return times

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str):
            return False
        try:
            found = self._database.execute("SELECT 1 FROM keys WHERE key = ?", (_stored(key),)).fetchone()
        except sqlite3.OperationalError as why:
            raise _failure(why) from why
        return found is not None

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Places:
    """The place of each key in the order of the lines, and its bytes in a file. On disk, like `Keys`."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            f"PRAGMA cache_size = -{_CACHE_KIB}",
            "CREATE TABLE places (key BLOB PRIMARY KEY, place INTEGER NOT NULL) WITHOUT ROWID",
            "CREATE TABLE parts (place INTEGER, start INTEGER, length INTEGER)",
            "BEGIN",
        ):
            self._database.execute(statement)
        self._count = 0

    def add(self, key: str) -> None:
        """Gives the key the next place, unless it already has one."""
        try:
            self._database.execute("INSERT OR IGNORE INTO places VALUES (?, ?)", (_stored(key), self._count))
        except sqlite3.OperationalError as why:
            raise _failure(why) from why
        self._count += 1

    def put(self, key: str, start: int, length: int) -> int:
        """Records which bytes of a file belong to the key.

        Returns its place; a key without one comes last.
        """
        try:
            found = self._database.execute(
                "SELECT place FROM places WHERE key = ?", (_stored(key),)
            ).fetchone()
            place: int = found[0] if found else self._count
            self._database.execute("INSERT INTO parts VALUES (?, ?, ?)", (place, start, length))
        except sqlite3.OperationalError as why:
            raise _failure(why) from why
        return place

    def in_order(self) -> Iterator[tuple[int, int]]:
        """Yields (start, length) of all parts, sorted by place, then by position in the file."""
        try:
            yield from self._database.execute("SELECT start, length FROM parts ORDER BY place, start")
        except sqlite3.OperationalError as why:
            raise _failure(why) from why

    def close(self) -> None:
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _stored(key: str) -> bytes:
    """Encodes a key as bytes, because sqlite's text refuses lone surrogates and sometimes stops at NUL."""
    return key.encode("utf-8", "surrogatepass")


def _failure(why: sqlite3.OperationalError) -> EmlocalError:
    return EmlocalError(
        f"cannot write the rows' keys to a temporary file: {why}",
        "free some space in the temporary folder, or set SQLITE_TMPDIR to another folder",
    )
