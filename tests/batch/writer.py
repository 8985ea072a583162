"""A process that writes an output, to be killed, starved of space or met by another one.

    python -m tests.batch.writer OUTPUT ROWS [retry|measure|full=BYTES|hold]

It prints a line after opening the output, and one at its end.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emlocal.batch.journal import Journal
from emlocal.errors import EmlocalError

SETTINGS: dict[str, object] = {"seed": 1, "em": {"threshold": 0.3}}


def row(number: int, size: int = 0) -> dict[str, Any]:
    """Returns the row of a deterministic run for line `number`."""
    return {"key": f"row-{number}", "text": f"Antwort {number} – ü\n" + "x" * size, "error": None}


def key_of(row: Mapping[str, object]) -> str:
    key = row["key"]
    if not isinstance(key, str):
        raise TypeError
    return key


def is_error(row: Mapping[str, object]) -> bool:
    return row["error"] is not None


def opened(
    path: Path,
    settings: Mapping[str, object] = SETTINGS,
    *,
    restart: bool = False,
    retry_errors: bool = False,
) -> Journal:
    return Journal.open(
        path, settings, key_of=key_of, is_error=is_error, restart=restart, retry_errors=retry_errors
    )


def run(path: Path, rows: int, size: int = 0, *, restart: bool = False, retry_errors: bool = False) -> None:
    """Opens the output and writes the missing rows."""
    with opened(path, restart=restart, retry_errors=retry_errors) as journal:
        print("open", journal.rows, journal.repaired, journal.retried, flush=True)
        for number in range(rows):
            if f"row-{number}" not in journal.done:
                journal.append(row(number, size))


def peak_bytes() -> int:
    """Reads VmHWM, not ru_maxrss, which starts at the peak of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource  # macOS: bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(path: Path, rows: int, what: str) -> None:
    if what.startswith("full="):
        import resource  # its limit fails a write in the middle of a row, like a full disk

        limit = int(what.removeprefix("full="))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if what == "hold":
        with opened(path):
            print("open", flush=True)
            time.sleep(60)
    elif what == "measure":
        with opened(path) as journal:
            print(journal.rows, peak_bytes())
    else:
        run(path, rows, size=0 if what == "retry" else 5000, retry_errors=what == "retry")
    print("end", flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
    except EmlocalError as failure:
        sys.exit(f"{failure.message} | {failure.hint}")
