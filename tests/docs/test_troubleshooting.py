"""The messages in docs/troubleshooting.md are those of the code."""

import ast
import re
from functools import cache

import pytest

from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "troubleshooting.md"
LEAST = 9
"""Minimum number of letters of a text in the code: one of placeholders alone would match anything."""

_SPOKEN_BEFORE = re.compile(r"^(error|warning|stopped): ")
_KEPT = re.compile(r"; the adapter of step … was kept$")


@cache
def texts_of_the_code() -> tuple[re.Pattern[str], ...]:
    """Returns every text in emlocal's source as a pattern in which a placeholder matches anything."""
    found: set[str] = set()
    for path in (ROOT / "emlocal").rglob("*.py"):
        found.update(_pattern(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return tuple(re.compile(text) for text in found if len(re.findall(r"[^\W\d_]", text)) >= LEAST)


def _pattern(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_pattern(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _pattern(node.left) + _pattern(node.right)
    return ".*"


def messages() -> list[str]:
    lines = [line for _, block in blocks(PAGE, "") for line in block.splitlines()]
    return [_KEPT.sub("", _SPOKEN_BEFORE.sub("", line)) for line in lines]


def test_there_are_messages() -> None:
    assert len(messages()) > 30


@pytest.mark.parametrize("message", messages())
def test_the_code_says_it(message: str) -> None:
    assert any(text.fullmatch(message) for text in texts_of_the_code()), f"emlocal never says {message!r}"
