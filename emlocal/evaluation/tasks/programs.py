"""Write a function: HumanEval, and files of its kind (`prompt`, `test`, `entry_point`), LeetCode's say.

A row's prompt is the head of the function with its description. `test` defines `check(candidate)`, which is
called with what `entry_point` names; a program passes when nothing is raised.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from emlocal.errors import UsageError
from emlocal.evaluation.sandbox.run import Limits, run
from emlocal.evaluation.tasks.reading import Row, Rows, ids
from emlocal.evaluation.tasks.task import Problem, Task

ASK = (
    "Complete this Python function. Answer with the whole function, imports included, in one code block.\n\n"
)
_FIRST_JUDGE = 1
_FENCED = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")
_FIELDS = ("prompt", "test", "entry_point")


class ProgramTask(Task):
    """Functions to be written; what is written is run."""

    runs_code: ClassVar[bool] = True
    votes: ClassVar[bool] = False

    def __init__(self, name: str, rows: Rows, limits: Limits = Limits()) -> None:
        """Raises UsageError for a row without prompt, test and entry point."""
        self._rows = {id_: _checked(row, n) for n, (id_, row) in enumerate(zip(ids(rows), rows, strict=True))}
        problems = [
            Problem(id_, f"{ASK}```python\n{row['prompt'].strip()}\n```", str(row["test"]))
            for id_, row in self._rows.items()
        ]
        super().__init__(name, problems, rows.source)
        self.limits = limits

    @property
    def judge(self) -> str:
        return f"programs {_FIRST_JUDGE}, {self.limits.seconds:g} s, {self.limits.memory:,} bytes"

    def find(self, problem: Problem, text: str, earlier: Mapping[str, str]) -> tuple[str, str] | None:
        """The program to run: the function that was written, and the tests."""
        row = self._rows[problem.id]
        entry = row["entry_point"]
        code = code_with(text, definition_of(entry))
        if code is None:
            return None
        return f"{_head(row['prompt'])}\n{code}\n\n{row['test']}\n\ncheck({entry})\n", "program"

    def check(self, problem: Problem, found: str) -> tuple[bool, str]:
        outcome = run(found, self.limits)
        return outcome.passed, "" if outcome.passed else outcome.detail


def code_with(text: str, definition: str) -> str | None:
    """The code in a model's text that has this definition ("def f"): the last such block, else all of it.

    A block that is not closed was cut off, but may hold a whole function. None where none has it.
    """
    wanted = re.compile(rf"^[ \t]*{re.escape(definition)}\b", re.MULTILINE)
    blocks: Sequence[re.Match[str]] = list(_FENCED.finditer(text))
    for block in reversed(blocks):
        if block[1].lower() in _PYTHON and wanted.search(block[2]):
            return block[2]
    return text if not blocks and wanted.search(text) else None


def _head(prompt: str) -> str:
    """The prompt as a program: its imports and the functions that it gives, which an answer may leave out."""
    started = [line for line in prompt.splitlines() if line.lstrip().startswith("def ")]
    indent = len(started[-1]) - len(started[-1].lstrip()) if started else 0
    program = f"{prompt.rstrip()}\n{' ' * (indent + 4)}pass\n" if started else prompt
    try:
        ast.parse(program)
    except SyntaxError:  # a description in words
        return ""
    return program


def definition_of(entry: str) -> str:
    """How the definition of an entry point begins: `f` is a function, `Solution().f` a class's method."""
    return f"class {entry.partition('(')[0]}" if "(" in entry else f"def {entry}"


def _checked(row: Row, index: int) -> dict[str, str]:
    for name in _FIELDS:
        if not isinstance(row.get(name), str):
            raise UsageError(
                f"problem {index + 1:,} has no text {name!r}", f"a row has the texts {', '.join(_FIELDS)}"
            )
    return {name: row[name] for name in _FIELDS}
