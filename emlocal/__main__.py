"""The start of the program: `emlocal` and `python -m emlocal`."""

import os
import signal
import sys
from contextlib import suppress
from io import FileIO, TextIOWrapper
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Runs the command line and exits with its exit code."""
    _open_streams()
    # numpy's BLAS multiplies only small matrices here; its threads would compete with the engine's for the
    # cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # otherwise the parent process wants it ignored
        signal.signal(signal.SIGTERM, _terminate)
    _leave(_run())


def _open_streams() -> None:
    """Opens the null device in place of standard streams that are closed.

    Daemons and cron close streams (`<&-`, `>&-`, `2>&-`). Without a replacement, the next file to be opened
    (a model or an output) would get the stream's number. The engine's messages on stderr would then go into
    that file. Afterwards stdin is empty and stderr is silent. Writing to stdout fails, because an answer that
    nobody gets is an error.
    """
    for number, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest free number, which is this one
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
    except KeyboardInterrupt:  # Ctrl-C before the command line can handle it
        return 130
    except SystemExit as leaving:  # SIGTERM
        return leaving.code if isinstance(leaving.code, int) else 1


def _leave(code: int) -> NoReturn:
    """Ends the process.

    If an abandoned native call still runs, the process ends at once: unloading the libraries under that call
    would crash it.
    """
    from emlocal.cancel import unfinished

    if unfinished():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Unwinds the program, so that temporary files and partial downloads are removed.

    The exit code is 128 + the signal's number, as in shells.
    """
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
