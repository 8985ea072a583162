"""A process that runs a batch into an output, and kills itself at given places.

    python -m tests.batch.resumed METHOD INPUT OUTPUT [PLACE COUNT]...

For each PLACE and COUNT, a child of this process resumes the run and is killed with SIGKILL when it reaches
the place for the COUNT-th time. After them, the run continues to its end. Children are forked, because a
hundred kills must not mean a hundred starts of Python.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from emlocal.batch import journal as journal_module
from emlocal.batch.journal import Journal
from emlocal.batch.lines import is_error, key_of, read_lines
from emlocal.methods import Chosen
from tests.batch.batches import batch_on, engine, settings

PLACES = ("step", "write", "torn", "written", "fsync", "synced", "open")
PARALLEL = 4


class Killer:
    """Kills this process at the given visit of the given place."""

    def __init__(self, place: str, count: int) -> None:
        self.place, self.left = place, count

    def visit(self, place: str, before: Callable[[], object] = lambda: None) -> None:
        if place != self.place:
            return
        self.left -= 1
        if self.left == 0:
            before()
            os.kill(os.getpid(), signal.SIGKILL)


def run(method: str, source: Path, output: Path, killer: Killer) -> None:
    """Resumes the run, which may die on the way."""
    write, fsync = os.write, os.fsync

    def watched_write(descriptor: int, data: bytes) -> int:
        killer.visit("write")
        killer.visit("torn", lambda: write(descriptor, data[: len(data) // 2]))
        written = write(descriptor, data)
        killer.visit("written")
        return written

    def watched_fsync(descriptor: int) -> None:
        killer.visit("fsync")
        fsync(descriptor)
        killer.visit("synced")

    os.write, os.fsync = watched_write, watched_fsync  # type: ignore[assignment]
    journal_module._SECONDS_BETWEEN_SYNCS = 0.0  # every row is synced, so that kills can come in between
    how = settings(Chosen(method), keep=True, fingerprint="x")
    with (
        source.open("rb") as lines,
        Journal.open(output, {"seed": 0}, key_of=key_of, is_error=is_error) as journal,
    ):
        killer.visit("open")
        batch = batch_on(engine(PARALLEL), read_lines(lines), how, PARALLEL, journal.done)

        def stepped() -> bool:
            killer.visit("step")
            return False

        for row in batch.rows(stepped):
            journal.append(row)


def killed(method: str, source: Path, output: Path, place: str, count: int) -> bool:
    """Whether a child of this process died as planned; it may have finished before."""
    child = os.fork()
    if child == 0:
        try:
            run(method, source, output, Killer(place, count))
        except BaseException as error:  # noqa: BLE001
            print(f"{place} {count}: {error!r}", file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL
    if os.WEXITSTATUS(status):
        sys.exit("a resumed run failed")
    return False


def main(method: str, source: Path, output: Path, *moments: str) -> None:
    deaths = sum(
        killed(method, source, output, place, int(count))
        for place, count in zip(moments[::2], moments[1::2], strict=True)
    )
    print("killed", deaths, flush=True)
    run(method, source, output, Killer("", 0))
    print("end", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
