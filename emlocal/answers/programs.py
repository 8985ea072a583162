"""The program in a model's text."""

import re
import textwrap
from collections.abc import Sequence

_FENCED = re.compile(
    r"^[ \t]*(```|~~~)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE
)
_PYTHON = ("", "python", "python3", "py", "py3")


def code_of(text: str, definition: str) -> str | None:
    """The code in a model's text that has this definition ("def f"): the last such block, else all of it.

    A block that is not closed was cut off, but may hold a whole function; one in a list is
    indented. None where none has it.
    """
    text = text.replace("\r\n", "\n")
    kind, _, name = definition.partition(" ")
    other = rf"|async[ \t]+def[ \t]+{re.escape(name)}\b|{re.escape(name)}[ \t]*=" if kind == "def" else ""
    wanted = re.compile(rf"^[ \t]*(?:{re.escape(definition)}\b{other})", re.MULTILINE)
    blocks: Sequence[re.Match[str]] = list(_FENCED.finditer(text))
    for block in reversed(blocks):
        if block[2].lower() in _PYTHON and wanted.search(block[3]):
            return textwrap.dedent(block[3])
    return text if not blocks and wanted.search(text) else None


def last_block(text: str) -> tuple[int, int] | None:
    """Where the last block of code stands that is not empty, without its fences."""
    blocks = [block.span(3) for block in _FENCED.finditer(text) if block[3].strip()]
    return blocks[-1] if blocks else None
