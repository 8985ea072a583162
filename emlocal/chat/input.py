"""Sources of messages: a terminal with line editing and history, or a pipe.

A reader raises EmlocalError for a message that it cannot accept; the caller can then read the next one. Any
other error means that nothing more can be read.

The history of earlier chats is kept in a file, or only in memory if the file fails.
"""

import asyncio
import codecs
import os
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit.history import FileHistory

from emlocal import console
from emlocal.errors import UsageError
from emlocal.text import well_formed

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

FENCE = '"""'
_ATTEMPTS = 3  # after this many failures of the line editor in a row, the terminal reader stops


class PipeReader:
    """Reads messages from stdin: one a line, or several lines between fences."""

    interactive = False

    def __init__(self) -> None:
        self._number = self._offset = 0  # lines and bytes so far

    def read(self, default: str = "") -> str | None:
        line = self._line()
        if line is None or line.strip() != FENCE:
            return line
        block: list[str] = []
        broken: UsageError | None = None
        while True:
            try:
                inner = self._line()
            except UsageError as error:  # keep reading: the rest of the block is not a message of its own
                broken = broken or error
                continue
            if inner is None:
                raise UsageError(f"the text that began with {FENCE} never ended")
            if inner.strip() == FENCE:
                break
            block.append(inner)
        if broken is not None:
            raise broken
        return "\n".join(block)

    def _line(self) -> str | None:
        """Returns the next line without its end, or None after the last.

        Raises UsageError if it is not UTF-8.
        """
        raw = sys.stdin.buffer.readline()
        if not raw:
            return None
        start, self._number, self._offset = self._offset, self._number + 1, self._offset + len(raw)
        if self._number == 1 and raw.startswith(codecs.BOM_UTF8):
            raw, start = raw[len(codecs.BOM_UTF8) :], start + len(codecs.BOM_UTF8)
        try:
            return raw.decode().rstrip("\r\n")
        except UnicodeDecodeError as why:
            raise UsageError(
                f"line {self._number} of stdin is not UTF-8 text: byte 0x{raw[why.start]:02x}"
                f" at offset {start + why.start:,}",
                "convert it first, with iconv -f LATIN1 -t UTF-8 for example",
            ) from None


class TerminalReader:
    """Reads messages from a person, with editing, history across sessions and completion of commands."""

    interactive = True

    def __init__(self, history: Path, commands: list[str], status: Callable[[], str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.styles import Style

        self._history = KeptHistory(history)
        self._say_if_history_fails()
        self._session: PromptSession[str] = PromptSession(
            history=self._history,
            completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
            complete_while_typing=False,
            key_bindings=_bindings(),
            prompt_continuation="... ",
            bottom_toolbar=status,
            style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold"}),
        )
        self._warned = False

    def read(self, default: str = "") -> str | None:
        failures = 0
        while True:
            try:
                text = self._session.prompt(
                    [("class:prompt", ">>> ")], default=default, pre_run=self._catch_errors
                )
            except KeyboardInterrupt:
                if not self._warned:
                    console.note("press Ctrl-D or type /exit to leave")
                    self._warned = True
                default = ""  # the person declined the offered text
                continue
            except EOFError:
                return None
            except Exception as error:
                failures += 1
                if failures == _ATTEMPTS:
                    raise
                console.warn(f"the line editor failed ({error}) and was restarted")
                # offer the typed text once more, unless it is the reason for the failure
                default = well_formed(self._session.default_buffer.text) if failures == 1 else ""
                continue
            self._say_if_history_fails()
            lines = text.strip().splitlines()
            if lines and lines[0] == FENCE:
                text = "\n".join(lines[1:-1])
            return self._whole(text)

    def _catch_errors(self) -> None:
        """Replaces the editor's own error handler, which shows a traceback and waits for Enter."""
        asyncio.get_running_loop().set_exception_handler(self._end_editing)

    def _end_editing(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Ends the line being edited, not the chat, after an error in the event loop."""
        app = self._session.app
        if app.is_running and not app.is_done:  # otherwise the line is complete and nothing is lost
            app.exit(exception=context.get("exception") or RuntimeError(str(context.get("message"))))

    def _whole(self, text: str) -> str:
        whole = well_formed(text)
        if whole != text:
            console.warn("the input is not UTF-8 text; the invalid bytes were replaced by \ufffd")
        return whole

    def _say_if_history_fails(self) -> None:
        if self._history.failure:
            console.warn(f"the history is not saved: {self._history.failure}")
            self._history.failure = ""


def _bindings() -> "KeyBindings":
    """Returns the key bindings: Enter sends, except inside a fenced block; Alt-Enter adds a line."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        lines = event.current_buffer.text.strip().splitlines()
        open_fence = bool(lines) and lines[0] == FENCE and (len(lines) == 1 or lines[-1] != FENCE)
        if open_fence:
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    return bindings


_MOST_BYTES = 4 << 20  # only this much of the file's end is read


class KeptHistory(FileHistory):
    """A history file that may be missing, broken, huge, or on a full disk.

    `failure` says what went wrong since it was last cleared. New texts are then kept for this chat only.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._usable = True
        self.failure = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not stat.S_ISREG(path.stat().st_mode):  # reading a FIFO would block
                self._fail(f"{path} is not a regular file")
                return
            with path.open("a+b"):
                pass
            if os.name == "posix":
                path.chmod(0o600)
        except OSError as why:
            self._fail(f"{path} cannot be written ({why.strerror})")

    def load_history_strings(self) -> Iterable[str]:
        """Returns the texts, newest first. Accepts a file of any content."""
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
        """Appends a text to the file."""
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
        return raw.partition(b"\n#")[2] if left_out else raw  # leaves out the text that the cut splits
