"""`emlocal` and `python -m emlocal`."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Run the command line and leave with its exit code."""
    # numpy's BLAS serves small products only; threads of its own would fight the engine's for the cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else whoever started us wants it ignored
        signal.signal(signal.SIGTERM, _terminate)
    _leave(_run())


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
