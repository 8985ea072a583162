"""What was typed in earlier chats: in a file, and in memory alone where that fails."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit.history import FileHistory

_MOST_BYTES = 4 << 20  # so much of the file's end is read


class KeptHistory(FileHistory):
    """A history file that can be missing, broken, huge, or on a full disk. `failure` says what is wrong with
    it since that was last asked; what is typed is then remembered for this chat only."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._usable = True
        self.failure = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not stat.S_ISREG(path.stat().st_mode):  # a FIFO would be waited for
                self._fail(f"{path} is no regular file")
                return
            with path.open("a+b"):
                pass
            if os.name == "posix":
                path.chmod(0o600)
        except OSError as why:
            self._fail(f"{path} cannot be written ({why.strerror})")

    def load_history_strings(self) -> Iterable[str]:
        """Newest first. A file of any content gives some texts."""
        try:
            raw = self._end_of_file() if self._usable else b""
        except OSError as why:
            self._fail(f"{self._path} cannot be read ({why.strerror})")
            return []
        texts: list[str] = []
        lines: list[str] = []
        for line in [*raw.decode(errors="replace").split("\n"), ""]:
            if line.startswith("+"):
                lines.append(line[1:])
            elif lines:
                texts.append("\n".join(lines))
                lines = []
        return reversed(texts)

    def store_string(self, string: str) -> None:
        """Add a text to the file."""
        try:
            if self._usable:
                super().store_string(string.encode(errors="replace").decode())
        except OSError as why:
            self._fail(f"{self._path} cannot be written ({why.strerror})")

    def _fail(self, what: str) -> None:
        self._usable = False
        self.failure = what

    def _end_of_file(self) -> bytes:
        with self._path.open("rb") as file:
            left_out = max(0, self._path.stat().st_size - _MOST_BYTES)
            file.seek(left_out)
            raw = file.read(_MOST_BYTES)
        return raw.partition(b"\n#")[2] if left_out else raw  # a text that began before is left out too
