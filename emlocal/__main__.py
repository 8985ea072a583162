"""`emlocal` and `python -m emlocal`."""

import os
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    # numpy's BLAS serves small products only; threads of its own would fight the engine's for the cores
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from emlocal.cli.app import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # before the command line is there to handle it
        sys.exit(130)


if __name__ == "__main__":
    main()
