"""The commands, code blocks, links and headings of the pages."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_PROMPT, _TYPED = "$ ", ">>> "


@dataclass(frozen=True)
class Command:
    """A line after `$ ` in a console block, with its continuation lines; `typed`: the lines after `>>> `."""

    line: int
    text: str
    typed: tuple[str, ...] = ()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Returns the fenced blocks in a language, each with the number of its first line."""
    text = page.read_text(encoding="utf-8")
    found = [m for m in _FENCE.finditer(text) if m[1] == language]
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in found]


def commands(page: Path) -> list[Command]:
    """Returns the commands of a page's console blocks, in order."""
    return [command for first, block in blocks(page, "console") for command in _commands(first, block)]


def _commands(first: int, block: str) -> list[Command]:
    found: list[Command] = []
    continued = False
    for number, line in enumerate(block.splitlines(), start=first):
        if line.startswith(_PROMPT):
            found.append(Command(number, line.removeprefix(_PROMPT)))
        elif continued:
            found[-1] = Command(found[-1].line, f"{found[-1].text}\n{line}")
        elif line.startswith(_TYPED) and found:
            found[-1] = Command(found[-1].line, found[-1].text, (*found[-1].typed, line.removeprefix(_TYPED)))
        continued = line.endswith("\\") and (line.startswith(_PROMPT) or continued)
    return found


def links(page: Path) -> list[str]:
    """Returns the targets of a page's links, without those in code."""
    return _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub gives to a page's headings."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
