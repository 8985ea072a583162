"""Finds the program in a model's text: in its fences wherever they stand, in prose, after the thoughts."""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator

from emlocal.answers.finding import answer_start, last

_FENCE = re.compile(r"(?:```+|~~~+)([^\n`~]*)|\[(/?)PYTHON\]", re.IGNORECASE)
PYTHON = ("", "python", "python3", "py", "py3")
"""The languages that the fence of a Python block may name, in lower case."""
_ANY = re.compile(r"^[ \t]*(?:async[ \t]+def|def|class)[ \t]+\w", re.MULTILINE)
_MOST_FENCES = 64
_TRIES = 64
_LINES_BEFORE = 200
"""Bounds on the number of compilations, for hostile texts."""
_GIVES = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def code_of(text: str, definition: str | None = None) -> str | None:
    """Returns the program in a model's text that has this definition ("def f", "class Solution").

    It is the last block of code that has the definition and compiles, with the imports and definitions of
    earlier blocks. Without such a block it is the longest part of the text that compiles. Otherwise it is the
    last block that has the definition, or the text, which is then not a right program. A block that is not
    closed was cut off, but may contain a whole function; a block in a list is indented. None if nothing has
    the definition.

    Args:
        definition: None: any function or class, in the longest block that has one.
    """
    start = answer_start(text)
    if start is None:
        return None
    text = text[start:].replace("\r\n", "\n")
    wanted = _wanted(definition)
    blocks = [block for block in _blocks(text, wanted) if wanted.search(block)]
    compiled = [block for block in blocks if parsed_code(block) is not None]
    if compiled:
        return _with_earlier(text, max(compiled, key=len) if definition is None else compiled[0], wanted)
    for part in (*blocks, text):
        if wanted.search(part) and (longest := _longest(part, wanted)):
            return longest
    if blocks:
        return blocks[0]
    return text if wanted.search(text) and not _FENCE.search(text) else None


def last_block(text: str) -> tuple[int, int] | None:
    """Returns where the last block of code is that is not empty, without its fences; one may be unclosed."""
    fences = list(_FENCE.finditer(text))
    spans = [
        (fence.end() + 1, fences[i + 1].start() if i + 1 < len(fences) else len(text))
        for i, fence in enumerate(fences)
        if i % 2 == 0
    ]
    return next((span for span in reversed(spans) if text[slice(*span)].strip()), None)


def _wanted(definition: str | None) -> re.Pattern[str]:
    if definition is None:
        return _ANY
    kind, _, name = definition.partition(" ")
    other = rf"|async[ \t]+def[ \t]+{re.escape(name)}\b|{re.escape(name)}[ \t]*=" if kind == "def" else ""
    return re.compile(rf"^[ \t]*(?:{re.escape(definition)}\b{other})", re.MULTILINE)


def _blocks(text: str, wanted: re.Pattern[str] | None) -> Iterator[str]:
    """Yields the blocks in fences, the last first.

    A block ends with the nearest fence with which it compiles, because docstrings contain fences too.

    Args:
        wanted: a pattern that a block must have before further fences are tried; None: only the nearest is
            tried.
    """
    fences = list(_FENCE.finditer(text))[-_MOST_FENCES:]
    tries = _TRIES
    for i in reversed(range(len(fences))):
        info = (fences[i][1] or "").split()
        if (info and info[0].lower() not in PYTHON) or fences[i][2] or not _starts_block(text, fences[i]):
            continue
        ends = [fence.start() for fence in fences[i + 1 :]] or [len(text)]
        nearest = textwrap.dedent(text[fences[i].end() : ends[0]]).lstrip("\n")
        if len(ends) > 1 and wanted is not None and wanted.search(nearest) and parsed_code(nearest) is None:
            for end in ends[1:tries]:
                longer = textwrap.dedent(text[fences[i].end() : end]).lstrip("\n")
                tries -= 1
                if parsed_code(longer) is not None:
                    nearest = longer
                    break
        yield nearest


def _starts_block(text: str, fence: re.Match[str]) -> bool:
    return text[fence.end() : fence.end() + 1] == "\n" or fence[0][-1] == "]"


def parsed_code(code: str) -> ast.Module | None:
    """Returns the parsed program of a model or a person; None if it does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes such as "\d"
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _with_earlier(text: str, block: str, wanted: re.Pattern[str]) -> str:
    """Returns a block after the imports and definitions of the blocks before it."""
    earlier: list[str] = []
    for other in _blocks(text, None):
        parsed = None if other == block or wanted.search(other) else parsed_code(other)
        if parsed is not None and parsed.body and all(isinstance(one, _GIVES) for one in parsed.body):
            earlier.insert(0, other)
    return "\n".join([*earlier, block])


def _longest(text: str, wanted: re.Pattern[str]) -> str | None:
    """Returns the longest part, in lines, that compiles around the last definition.

    It includes the imports, definitions and assignments before the definition.
    """
    found = last(wanted.finditer(text))
    if found is None:
        return None
    before, after = text[: found.start()].splitlines(), text[found.start() :].splitlines()
    indent = len(after[0]) - len(after[0].lstrip())
    for n, line in enumerate(after):
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            after = after[:n]
            break
    while before and before[-1].lstrip().startswith("@"):  # a decorator
        after.insert(0, before.pop())
    body = _compiling([line[indent:] for line in after])
    if body is None:
        return None
    kept: list[str] = []
    before = before[-_LINES_BEFORE:]
    for _ in range(_LINES_BEFORE):
        fault = _fault("\n".join(before))
        if fault is None:
            break
        kept += _given("\n".join(before[: fault - 1]))
        before = before[fault:]
    return "\n".join([*kept, *_given("\n".join(before)), body])


def _compiling(lines: list[str]) -> str | None:
    """Returns the lines from the first that compile, up to where prose begins."""
    for _ in range(_TRIES):
        code = "\n".join(lines)
        fault = _fault(code)
        if fault is None:
            parsed = parsed_code(code)
            prose = next((one for one in parsed.body if _is_prose(one)), None) if parsed else None
            return "\n".join(lines[: prose.lineno - 1]) if prose else code
        if fault <= 1 or len(lines) <= 1:
            return None
        lines = lines[: min(fault, len(lines)) - 1]
    return None


def _given(code: str) -> list[str]:
    """Returns the imports, definitions and assignments in a text; none if it does not compile."""
    parsed = parsed_code(textwrap.dedent(code))
    if parsed is None:
        return []
    return [ast.unparse(one) for one in parsed.body if isinstance(one, (*_GIVES, ast.Assign, ast.AnnAssign))]


def _is_prose(statement: ast.stmt) -> bool:
    """Returns whether a statement is a line of words that is Python by chance (`Explanation`).

    Such a line would fail when it runs.
    """
    return isinstance(statement, ast.Expr) and not isinstance(
        statement.value, ast.Call | ast.Constant | ast.Await
    )


def _fault(code: str) -> int | None:
    """Returns the line, from 1, at which code does not compile; None if it compiles."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except SyntaxError as error:
        return max(1, error.lineno or 1)
    except (ValueError, RecursionError, MemoryError):
        return 1
    return None
