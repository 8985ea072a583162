"""`emlocal` and `python -m emlocal`."""

import os
import signal
import sys
from contextlib import suppress
from io import FileIO, TextIOWrapper
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Run the command line and leave with its exit code."""
    _open_streams()
    # numpy's BLAS serves small products only; threads of its own would fight the engine's for the cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else whoever started us wants it ignored
        signal.signal(signal.SIGTERM, _terminate)
    _leave(_run())


def _open_streams() -> None:
    """Give closed streams (`<&-`, `>&-`, `2>&-`, as daemons and cron have them) something to stand on.

    Otherwise the next file to be opened, a model or an output, would get their number, and what the engine
    says on stderr would go into it. stdin is then empty and stderr silent; what is written to stdout fails,
    since an answer that nobody gets is an error.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free, which is this one
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8")
    if sys.stdout is None:
        sys.stdout = TextIOWrapper(FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")


def _run() -> int:
    try:
        from emlocal.cli.app import run

        return run(sys.argv[1:])
    except KeyboardInterrupt:  # before the command line is there to handle it
        return 130
    except SystemExit as leaving:  # SIGTERM
        return leaving.code if isinstance(leaving.code, int) else 1


def _leave(code: int) -> NoReturn:
    """End the process; at once where a native call that was given up still runs, which would crash if the
    libraries were taken down under it."""
    from emlocal.cancel import unfinished

    if unfinished():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Unwind the program, so that temporary files and half a download go; exit as shells report a signal."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
