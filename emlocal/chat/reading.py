"""Where messages come from: a terminal with line editing and history, or a pipe."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from emlocal import console
from emlocal.errors import UsageError

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

FENCE = '"""'


class PipeReader:
    """Messages from stdin, one a line; several lines between fences."""

    interactive = False

    def __init__(self) -> None:
        self._lines = self._decoded()

    def read(self, default: str = "") -> str | None:
        line = next(self._lines, None)
        if line is None or line.strip() != FENCE:
            return line
        block: list[str] = []
        for inner in self._lines:
            if inner.strip() == FENCE:
                return "\n".join(block)
            block.append(inner)
        raise UsageError(f"the text that began with {FENCE} never ended")

    def _decoded(self) -> Iterator[str]:
        before = 0
        for number, raw in enumerate(sys.stdin.buffer, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as why:
                offset = before + len(raw) - len(why.object) + why.start  # `object` lacks the BOM
                raise UsageError(
                    f"line {number} of stdin is not UTF-8 text: byte 0x{why.object[why.start]:02x}"
                    f" at offset {offset:,}",
                    "convert it first, with iconv -f LATIN1 -t UTF-8 for example",
                ) from why
            before += len(raw)


class TerminalReader:
    """Messages from a person: editing, history over sessions, completion of commands."""

    interactive = True

    def __init__(self, history: Path, commands: list[str], status: Callable[[], str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.styles import Style

        self._session: PromptSession[str] = PromptSession(
            history=_history(history),
            completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
            complete_while_typing=False,
            key_bindings=_bindings(),
            prompt_continuation="... ",
            bottom_toolbar=status,
            style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack", "prompt": "bold"}),
        )
        self._warned = False

    def read(self, default: str = "") -> str | None:
        while True:
            try:
                text = self._session.prompt([("class:prompt", ">>> ")], default=default)
            except KeyboardInterrupt:
                if not self._warned:
                    console.note("Ctrl-D or /exit leaves")
                    self._warned = True
                default = ""  # what was offered is declined
                continue
            except EOFError:
                return None
            lines = text.strip().splitlines()
            if lines and lines[0] == FENCE:
                return "\n".join(lines[1:-1])
            return text


def _history(path: Path) -> "History":
    """History in a file; in memory where the file cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as why:
        console.warn(f"no history over sessions: {path} cannot be written ({why.strerror})")
        return InMemoryHistory()
    if os.name == "posix":
        path.chmod(0o600)
    return FileHistory(str(path))


def _bindings() -> "KeyBindings":
    """Enter sends, except inside a fenced block; Alt-Enter makes a new line."""
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
