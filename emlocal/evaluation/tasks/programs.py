"""Tasks that ask for a function: HumanEval and similar files, and LeetCode's problems in two published forms.

- HumanEval: `prompt` is the head of the function with its description; `test` defines `check(candidate)`,
  which is called with the function that `entry_point` names.
- LeetCodeDataset (Xia et al. 2025): the same, but `prompt` holds only imports, and the question is `query`.
- DeepSeek-Coder's LeetCode contests: the question is `prompt_sft`, and `test` calls `Solution()` itself.

A program passes if it raises nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from emlocal.answers.programs import code_of
from emlocal.errors import UsageError
from emlocal.evaluation.tasks.task import Problem, Row, Rows, Task
from emlocal.methods.programs import head_of, joined
from emlocal.sandbox.run import Limits, run

ASK = (
    "Complete this Python function. Answer with the whole function, imports included, in one code block.\n\n"
)
_ASK_CLASS = "\n\nAnswer with the whole class, imports included, in one code block."
_FIRST_JUDGE = 3
_LEETCODE = "\n".join(
    (
        *(f"from {module} import *" for module in ("typing", "functools", "collections", "itertools")),
        *(f"from {module} import *" for module in ("heapq", "bisect", "string", "operator", "math")),
        "import collections, functools, heapq, bisect, math, re, string, random, itertools",
        "inf = float('inf')",
    )
)
"""The imports that LeetCode provides for its users."""


@dataclass(frozen=True)
class _Asked:
    """A parsed row."""

    question: str
    title: str
    head: str
    """Code that runs before the answer."""
    definition: str
    """Definition that an answer must contain: "def f"."""
    tests: str


class ProgramTask(Task):
    """Functions to write; judging runs them."""

    runs_code: ClassVar[bool] = True
    votes: ClassVar[bool] = False

    def __init__(self, name: str, rows: Rows, limits: Limits = Limits()) -> None:
        """Raises UsageError for a row of another form than these three."""
        self._asked = {
            id_: _understood(row, rows.where(i))
            for i, (id_, row) in enumerate(zip(rows.ids, rows, strict=True))
        }
        problems = [Problem(id_, asked.question, asked.tests) for id_, asked in self._asked.items()]
        super().__init__(name, problems, rows)
        self.limits = limits

    @property
    def judge(self) -> str:
        return f"programs {_FIRST_JUDGE}, {self.limits.seconds:g} s, {self.limits.memory:,} bytes"

    def title(self, problem: Problem) -> str:
        return self._asked[problem.id].title

    def find(self, problem: Problem, text: str, earlier: Mapping[str, str]) -> tuple[str, str] | None:
        """Returns the program to run: the answer's function and the tests."""
        asked = self._asked[problem.id]
        code = code_of(text, asked.definition)
        if code is None:
            return None
        return joined(asked.head, code, "", asked.tests, ""), "program"

    def check(self, problem: Problem, found: str) -> tuple[bool, str]:
        outcome = run(found, self.limits)
        return outcome.passed, "" if outcome.passed else outcome.detail


def definition_of(entry: str) -> str:
    """Returns the start of an entry point's definition.

    `f` is a function, `Solution().f` a class's method.
    """
    return f"class {entry.partition('(')[0]}" if "(" in entry else f"def {entry}"


def _understood(row: Row, where: str) -> _Asked:
    """Parses a row. Raises UsageError, with the row's place, if it has none of the three forms."""
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    meta = row.get("meta")
    if isinstance(meta, Mapping) and isinstance(meta.get("query"), str):
        texts.setdefault("query", meta["query"])
    test, entry, prompt = (texts.get(name) for name in ("test", "entry_point", "prompt"))
    if test and entry and "query" in texts:
        tests = f"{test}\n\ncheck({entry})"
        return _Asked(
            texts["query"].strip() + _ASK_CLASS, texts["query"], prompt or "", definition_of(entry), tests
        )
    if test and entry and prompt:
        definition = definition_of(entry)
        question = f"{ASK}```python\n{prompt.strip()}\n```"
        title = prompt[max(0, prompt.rfind(definition)) :]
        return _Asked(question, title, head_of(prompt), definition, f"{test}\n\ncheck({entry})")
    if test and "prompt_sft" in texts:
        question = texts["prompt_sft"].strip()
        return _Asked(question + _ASK_CLASS, question, _LEETCODE, "class Solution", test)
    missing = "test" if not test else "prompt" if not prompt else "entry_point"
    raise UsageError(
        f"{where} has no text {missing!r}",
        "write a row with the texts prompt, test and entry_point, or as docs/evaluation.md says",
    )
