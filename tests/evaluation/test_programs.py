"""Functions that models write: found in their texts, and run with their tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from emlocal.answers.programs import code_of
from emlocal.errors import UsageError
from emlocal.evaluation.tasks import open_task
from emlocal.evaluation.tasks.programs import ProgramTask
from emlocal.evaluation.tasks.task import read_rows
from tests.evaluation.data import HUMANEVAL_ROW, contained, mark, rows, write

RIGHT = "def total(numbers):\n    return sum(map(double, numbers))"


@contained
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Sure:\n```python\n{RIGHT}\n```\nThis works.", "right"),
        (f"```\n{RIGHT}\n```", "right"),
        (RIGHT, "right"),
        (f"```python\nimport re\n{RIGHT}\n```\nUse:\n```python\nprint(total([1]))\n```", "right"),
        (f"```python\ndef total(n): return 0\n```\nBetter:\n```python\n{RIGHT}\n```", "right"),
        (f"```python\n{RIGHT}\n", "right"),
        ("```python\ndef total(numbers):\n    return 0\n```", "wrong"),
        ("```python\ndef total(numbers):\n    return (\n```", "wrong"),
        ("```python\ndef total(numbers):\n    while True: pass\n```", "wrong"),
        ("```python\nimport sys\ndef total(n): return 0\nsys.exit(0)\n```", "wrong"),
        (f"```python\nfrom __future__ import annotations\n{RIGHT}\n```", "right"),
        (f"```python\n{RIGHT}\nif __name__ == '__main__':\n    print(total(input()))\n```", "right"),
        (f"```python\nimport unittest\n{RIGHT}\nif __name__ == '__main__': unittest.main()\n```", "right"),
        (f"```python\r\n{RIGHT}\r\n```\r\n", "right"),
        (f"~~~py3\n{RIGHT}\n~~~", "right"),
        (f"```python title=total.py\n{RIGHT}\n```", "right"),
        ("```python\ntotal = lambda numbers: 2 * sum(numbers)\n```", "right"),
        ("- So:\n\n  ```python\n  def total(numbers):\n      return 2 * sum(numbers)\n  ```", "right"),
        (
            "```python\nfrom __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
            "class A:\n    n: int\ndef total(numbers):\n    return A(2 * sum(numbers)).n\n```",
            "right",
        ),
        ("```python\ndef totals(numbers):\n    return 0\n```", "no answer"),
        ("```bash\necho def total\n```", "no answer"),
        ("I would sum them.", "no answer"),
        ("", "no answer"),
    ],
)  # fmt: skip
def test_a_function_is_found_and_tested(tmp_path: Path, text: str, expected: str) -> None:
    task = open_task("humaneval", write(tmp_path / "h.jsonl", [HUMANEVAL_ROW]), code_seconds=1)
    assert mark(task, text) == expected


@contained
def test_a_method_of_a_class_is_an_entry_point() -> None:
    row = {
        "prompt": "class Solution:\n    def twice(self, n: int) -> int:\n        ",
        "entry_point": "Solution().twice",
        "test": "def check(candidate):\n    assert candidate(n=4) == 8",
    }
    task = ProgramTask("leetcode", rows(row))
    assert (
        mark(task, "```python\nclass Solution:\n    def twice(self, n):\n        return n * 2\n```")
        == "right"
    )
    assert mark(task, "```python\nclass Solution:\n    def twice(self, n):\n        return n\n```") == "wrong"
    assert mark(task, "```python\ndef twice(n):\n    return n * 2\n```") == "no answer"


TWICE = "class Solution:\n    def twice(self, n: int) -> int:"


@contained
@pytest.mark.parametrize(
    "row",
    [
        {  # LeetCodeDataset
            "prompt": "from typing import *\nfrom math import *\n",
            "query": f"Double n.\n\nPlease complete the following code precisely:\n```python\n{TWICE}\n```",
            "entry_point": "Solution().twice",
            "test": "def check(candidate):\n    assert candidate(n=4) == 8",
        },
        {  # older files of that set
            "prompt": "from typing import *\nfrom math import *\n",
            "meta": {"query": f"Double n.\n```python\n{TWICE}\n```"},
            "entry_point": "Solution().twice",
            "test": "def check(candidate):\n    assert candidate(n=4) == 8",
        },
        {  # DeepSeek-Coder's contests
            "prompt": f'"""\nDouble n.\n"""\n{TWICE}\n        ',
            "prompt_sft": f"Double n.\n```python\n{TWICE}\n        \n```",
            "test": '\nmy_solution = Solution()\ntest_input = {"n": 4}\n'
            "assert my_solution.twice(**test_input) == 8",
        },
    ],
)
def test_leetcode_in_its_published_forms(row: dict[str, Any]) -> None:
    task = ProgramTask("leetcode", rows(row))
    assert "Double n." in task.problems[0].question
    assert TWICE in task.problems[0].question
    right = f"```python\n{TWICE}\n        return int(sqrt(n * n)) + n if List else 0\n```"
    assert mark(task, right) == "right"
    assert mark(task, right.replace("+ n", "+ 1")) == "wrong"


@contained
def test_a_prompt_in_words_is_no_program() -> None:
    row = {"prompt": "Write f(x) = 2x.", "entry_point": "f", "test": "def check(f):\n    assert f(2) == 4"}
    assert mark(ProgramTask("x", rows(row)), "def f(x):\n    return 2 * x") == "right"


def test_a_row_that_is_no_program_is_refused() -> None:
    with pytest.raises(UsageError, match="problem 1 has no text 'test'"):
        ProgramTask("humaneval", rows({"prompt": "def f():", "entry_point": "f"}))


def test_the_line_of_a_row_that_is_no_program_is_named(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text(f"\n{json.dumps(HUMANEVAL_ROW)}\n\n" + '{"prompt": "def f():", "test": "x"}\n')
    with pytest.raises(UsageError, match=r"problem 2 \(line 4\) has no text 'entry_point'"):
        ProgramTask("humaneval", read_rows(file))


def test_the_prompt_shows_the_head() -> None:
    problem = ProgramTask("humaneval", rows(HUMANEVAL_ROW)).problems[0]
    assert "```python\nfrom typing import List" in problem.question
    assert problem.id == "T/0"


def test_blocks_in_lists_and_of_other_languages() -> None:
    text = "1. Here:\n   ```python\n   def f(): pass\n   ```\n```js\ndef f() {}\n```"
    assert code_of(text, "def f") == "def f(): pass\n"
    assert code_of("```js\ndef f()\n```", "def f") is None
