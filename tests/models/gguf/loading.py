"""The real library in a separate process, for files that may crash it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from emlocal.errors import ModelError
from emlocal.models.gguf import read_header

LOAD_SECONDS = 20.0  # a file that takes longer hangs llama.cpp, which is as bad as a crash


def accepted(path: Path) -> bool:
    """Whether the reader accepts the file. Any error but a ModelError of one clean line fails the test."""
    try:
        read_header(path)
    except ModelError as error:
        refusal = error.message
    else:
        return True
    assert refusal.isprintable()
    return False


class Worker:
    """llama.cpp in a separate process, which is started again after a crash.

    `module`: the module to run there, `llama_worker` or `emlocal_worker`.
    """

    def __init__(self, module: str = "llama_worker") -> None:
        self._module = f"tests.models.gguf.{module}"
        self.process: subprocess.Popen[str] | None = None

    def load(self, path: Path) -> str:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # otherwise an abort starts gdb
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        too_long = threading.Timer(LOAD_SECONDS, self.process.kill)
        too_long.start()
        verdict = self.process.stdout.readline().strip()
        too_long.cancel()
        if not verdict:
            verdict = f"killed the process, code {self.process.wait()}"
            self.process = None
        return verdict

    def close(self) -> None:
        if self.process is not None:
            self.process.communicate()
