"""Things that belong to others while attacks run: files, a process, System V and POSIX objects, sockets."""

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECRET = b"VICTIM's secret"
_PROCESS = (
    "import ctypes, sys\n"
    'secret = ctypes.create_string_buffer(b"VICTIM\'s secret")\n'
    "print(ctypes.addressof(secret), flush=True)\n"
    "sys.stdin.readline()\n"
    "print(secret.value.decode(), flush=True)"
)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmat.restype = ctypes.c_void_p


@dataclass
class Victims:
    """Creates the victims, tells attacks about them, and checks that they are unharmed."""

    told: dict[str, Any]
    _process: subprocess.Popen[bytes]
    _memory: int
    _sockets: list[socket.socket]

    def unharmed(self) -> None:
        """Raises AssertionError if anything was changed, taken or reached."""
        assert Path(self.told["file"]).read_text() == "secret"
        assert [path.name for path in Path(self.told["folder"]).iterdir()] == ["file"]
        assert Path(self.told["posix"]).read_bytes() == SECRET
        assert ctypes.string_at(self._memory, len(SECRET)) == SECRET
        assert _libc.semctl(self.told["semaphore"], 0, 12) == 3
        taken = ctypes.create_string_buffer(64)
        assert _libc.msgrcv(self.told["queue"], taken, 32, 0, 0o4000) == len(SECRET)
        # there was one message, and it is still there
        assert _libc.msgrcv(self.told["queue"], taken, 32, 0, 0o4000) == -1
        _send(self.told["queue"])
        for listening in self._sockets:
            listening.settimeout(0.05)
            try:
                listening.accept()
            except TimeoutError:
                continue
            raise AssertionError("somebody connected")
        assert self._process.poll() is None

    def say(self) -> bytes:
        """Returns what the process has in its memory; the process then ends."""
        said, _ = self._process.communicate(b"\n")
        return said.strip()


@contextmanager
def victims(folder: Path) -> Iterator[Victims]:
    with ExitStack() as stack:
        told: dict[str, Any] = {"readable": os.__file__, "folder": str(folder), "file": str(folder / "file")}
        (folder / "file").write_text("secret")
        posix = Path("/dev/shm", f"emlocal-attack-{os.getpid()}")
        posix.write_bytes(SECRET)
        stack.callback(posix.unlink)
        told["posix"] = str(posix)
        memory = _system_v(told, stack)
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0)))]
        told["port"] = sockets[0].getsockname()[1]
        sockets.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
        told["abstract"] = f"emlocal-attack-{os.getpid()}"
        sockets[1].bind("\0" + told["abstract"])
        sockets[1].listen()
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", _PROCESS],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "VICTIM_SECRET": "1"},
            )
        )
        stack.callback(process.kill)
        assert process.stdout is not None
        told |= {"pid": process.pid, "address": int(process.stdout.readline())}
        yield Victims(told, process, memory, sockets)


def _system_v(told: dict[str, Any], stack: ExitStack) -> int:
    """Creates a segment, a queue and a semaphore; returns the segment's address in this process."""
    told["segment"] = _libc.shmget(0, 4096, 0o1600)
    stack.callback(_libc.shmctl, told["segment"], 0, None)
    memory = int(_libc.shmat(told["segment"], None, 0))
    stack.callback(_libc.shmdt, ctypes.c_void_p(memory))
    ctypes.memmove(memory, SECRET, len(SECRET))
    told["queue"] = _libc.msgget(0, 0o1600)
    stack.callback(_libc.msgctl, told["queue"], 0, None)
    _send(told["queue"])
    told["semaphore"] = _libc.semget(0, 1, 0o1600)
    stack.callback(_libc.semctl, told["semaphore"], 0, 0)
    _libc.semctl(told["semaphore"], 0, 16, 3)
    return memory


def _send(queue: int) -> None:
    message = ctypes.create_string_buffer((1).to_bytes(8, sys.byteorder) + SECRET)
    assert _libc.msgsnd(queue, message, len(SECRET), 0) == 0
