"""Write a function: HumanEval, and files of its kind; LeetCode's problems in two published forms.

- HumanEval: `prompt` is the head of the function with its description; `test` defines `check(candidate)`,
  which is called with what `entry_point` names.
- LeetCodeDataset (Xia et al. 2025): the same, but `prompt` holds imports only, and the question is `query`.
- DeepSeek-Coder's LeetCode contests: the question is `prompt_sft`, and `test` calls `Solution()` by itself.

A program passes when nothing is raised.
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
"""What LeetCode imports for its users."""


@dataclass(frozen=True)
class _Asked:
    """A row, understood."""

    question: str
    title: str
    head: str
    """A program that goes before the answer."""
    definition: str
    """What an answer must define: "def f"."""
    tests: str


class ProgramTask(Task):
    """Functions to be written; what is written is run."""

    runs_code: ClassVar[bool] = True
    votes: ClassVar[bool] = False

    def __init__(self, name: str, rows: Rows, limits: Limits = Limits()) -> None:
        """Raises UsageError for a row of none of the three kinds."""
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
        """The program to run: the function that was written, and the tests."""
        asked = self._asked[problem.id]
        code = code_of(text, asked.definition)
        if code is None:
            return None
        return joined(asked.head, code, "", asked.tests, ""), "program"

    def check(self, problem: Problem, found: str) -> tuple[bool, str]:
        outcome = run(found, self.limits)
        return outcome.passed, "" if outcome.passed else outcome.detail


def definition_of(entry: str) -> str:
    """How the definition of an entry point begins: `f` is a function, `Solution().f` a class's method."""
    return f"class {entry.partition('(')[0]}" if "(" in entry else f"def {entry}"


def _understood(row: Row, where: str) -> _Asked:
    """Raises UsageError, with where the row is, for a row of none of the three kinds."""
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
        "a row has the texts prompt, test and entry_point; docs/evaluation.md has the other forms",
    )
