"""The paths, modules and names of code that the pages mention exist."""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT
from tests.test_imports import LAYERS

ARCHITECTURE = ROOT / "docs" / "architecture.md"
PLACES = ("", "emlocal", "emlocal/models", "emlocal/backends", "emlocal/evaluation", "tests")
"""Places where a path may begin: pages leave out the folder that their paragraph is about."""
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_PATH = re.compile(r"[\w.\-]+(?:/[\w.\-]+)*\.(?:py|pyi|c|h|toml|md)")
_MODULE = re.compile(r"\bemlocal(?:\.[a-z_]\w*)+")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """Returns the inline code of a page, without blocks."""
    return _CODE.findall(_FENCED.sub("", page.read_text(encoding="utf-8")))


@cache
def names_in(path: Path) -> frozenset[str]:
    """Returns the names that a file defines: classes with methods and fields, functions, constants."""
    found: set[str] = set()

    def add(body: list[ast.stmt], inside: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found.add(inside + node.name)
                add(node.body, f"{inside}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                found.add(inside + node.name)
            elif isinstance(node, ast.AnnAssign):
                found.add(inside + ast.unparse(node.target))
            elif isinstance(node, ast.Assign):
                found.update(inside + ast.unparse(target) for target in node.targets)

    add(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return frozenset(found)


def file_of(path: str) -> Path | None:
    return next((ROOT / place / path for place in PLACES if (ROOT / place / path).is_file()), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_code_is_named_is_there(page: Path) -> None:
    own = {  # the files that the page itself makes
        path
        for block in _FENCED.findall(page.read_text(encoding="utf-8"))
        for path in re.findall(r"^# (emlocal/\S+\.py)$", block, re.MULTILINE)
    }
    for span in spans(page):
        path, colons, name = span.partition("::")
        if not _PATH.fullmatch(path) or path in own or not (colons or "/" in path):
            continue  # names without a folder belong to another page, or to users
        file = file_of(path)
        assert file is not None, f"{page.name}: there is no {path}"
        if colons:
            assert name in names_in(file), f"{page.name}: {path} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_module_is_named_is_there(page: Path) -> None:
    for span in spans(page):
        for dotted in _MODULE.findall(span):
            _, *parts = dotted.split(".")
            assert is_there(parts), f"{page.name}: there is no {dotted}"


def is_there(parts: list[str]) -> bool:
    """Whether emlocal.<parts> is a module or a name in one. Names in emlocal itself are loaded late."""
    import emlocal

    if len(parts) == 1 and parts[0] in emlocal.__all__:
        return True
    if find_spec(".".join(["emlocal", *parts[:1]])) is None:
        return False
    if len(parts) == 1:
        return True
    below = ROOT / "emlocal" / Path(*parts)
    if below.is_dir() or below.with_suffix(".py").is_file():
        return True
    module = below.parent / "__init__.py" if below.parent.is_dir() else below.parent.with_suffix(".py")
    return module.is_file() and parts[-1] in names_in(module)


def test_the_map_has_every_room_in_its_place() -> None:
    rooms = re.findall(r"^\| `(\w+)` \|", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    wanted = [[room for room in layer if "/" not in room] for layer in LAYERS]
    place = 0
    for layer in filter(None, wanted):
        assert sorted(rooms[place : place + len(layer)]) == sorted(layer)
        place += len(layer)
    assert place == len(rooms)


def test_the_architecture_is_two_pages_at_most() -> None:
    words = ARCHITECTURE.read_text(encoding="utf-8").split()
    assert len(words) < 1100


def test_names_are_found() -> None:
    names = names_in(ROOT / "emlocal" / "generation" / "scheduler.py")
    assert {"Scheduler", "Scheduler.step", "SPARE_SEQUENCES"} <= names
    assert "Scheduler.absent" not in names
    assert file_of("generation/absent.py") is None
    assert is_there(["finetune"])
    assert is_there(["em", "steps"])
    assert is_there(["settings", "table", "setting"])
    assert not is_there(["absent"])
    assert not is_there(["em", "absent"])
