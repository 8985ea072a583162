"""emlocal in a real pseudo-terminal, driven by bytes."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

PATIENCE = 20.0  # seconds until a test gives up


class Terminal:
    """`python -m emlocal ARGUMENTS` with a pseudo-terminal as its three streams; it ends with the block."""

    def __init__(
        self, *arguments: str, folder: Path, prepare: Callable[[], None] | None = None, **variables: str
    ) -> None:
        self.master, slave = pty.openpty()
        environment: Mapping[str, str] = {
            **os.environ,
            **{f"EMLOCAL_{kind}_DIR": str(folder) for kind in ("CACHE", "CONFIG", "DATA")},
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "TERM": "xterm",
            **variables,
        }

        def begin() -> None:
            os.setsid()
            import fcntl
            import termios

            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the slave becomes the controlling terminal
            if prepare is not None:
                prepare()

        self.process = subprocess.Popen(
            [sys.executable, "-m", "emlocal", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            preexec_fn=begin,
        )
        os.close(slave)
        self.said = b""

    def send(self, raw: bytes) -> None:
        """Types these bytes, and reads meanwhile so that neither side waits for the other."""
        while raw:
            reading, writing, _ = select.select([self.master], [self.master], [], PATIENCE)
            if reading and not self._read():
                return
            if writing:
                raw = raw[os.write(self.master, raw[:512]) :]

    def wait_for(self, pattern: str, count: int = 1) -> bytes:
        """Reads until the pattern has been shown this often; returns the output."""
        end = time.monotonic() + PATIENCE
        while len(re.findall(pattern.encode(), self.said)) < count:
            ready, _, _ = select.select([self.master], [], [], 1.0)
            ended = ready and not self._read()
            assert not ended, f"it ended without {pattern!r}: {self.said[-2000:]!r}"
            assert time.monotonic() < end, f"no {pattern!r}: {self.said[-2000:]!r}"
        return self.said

    def _read(self) -> bool:
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # EIO: nobody has the other side open any more
            return False
        self.said += piece
        return bool(piece)

    def end(self) -> int:
        """Reads until the process ends; returns the exit code."""
        while self._read():
            pass
        return self.process.wait(timeout=PATIENCE)

    def hang_up(self) -> int:
        """Closes the terminal's window; returns the exit code."""
        os.close(self.master)
        self.master = -1
        return self.process.wait(timeout=PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if self.master >= 0:
            os.close(self.master)
