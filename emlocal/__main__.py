"""`emlocal` and `python -m emlocal`."""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line and leave with its exit code."""
    # numpy's BLAS serves small products only; threads of its own would fight the engine's for the cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else whoever started us wants it ignored
        signal.signal(signal.SIGTERM, _terminate)
    try:
        from emlocal.cli.app import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # before the command line is there to handle it
        sys.exit(130)


def _terminate(number: int, frame: FrameType | None) -> None:
    """Unwind the program, so that temporary files and half a download go; exit as shells report a signal."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
