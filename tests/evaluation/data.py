"""Small tasks for the tests beside this file."""

import json
from pathlib import Path
from typing import Any

import pytest

from emlocal.evaluation.tasks.task import Rows, Task
from emlocal.sandbox import landlock

HUMANEVAL_ROW = {
    "task_id": "T/0",
    "prompt": (
        "from typing import List\n\n\ndef double(n: int) -> int:\n    return 2 * n\n\n\n"
        'def total(numbers: List[int]) -> int:\n    """ The sum of twice the numbers.\n    """\n'
    ),
    "entry_point": "total",
    "test": (
        "def check(candidate):\n    assert candidate([]) == 0\n    assert candidate([1, 2]) == 6\n"
        "    assert candidate([1] * 9) == 18\n"
    ),
}

SCICODE_ROW: dict[str, Any] = {
    "problem_id": "900",
    "problem_description_main": "Sums of squares.",
    "required_dependencies": "import numpy as np",
    "sub_steps": [
        {
            "step_number": "900.1",
            "step_description_prompt": "Square the numbers.",
            "step_background": "A square is a number times itself.",
            "function_header": "def squares(x):\n    '''Squares of x.'''",
            "ground_truth_code": "def squares(x):\n    return np.asarray(x) ** 2",
            "test_cases": [
                "x = [1, 2]\nassert np.allclose(squares(x), target)",
                "assert np.allclose(squares(x)[0], target[0]) and np.allclose(squares(x)[1], target[1])",
            ],
        },
        {
            "step_number": "900.2",
            "step_description_prompt": "Sum the squares.",
            "step_background": "",
            "function_header": "def total(x):\n    '''Their sum, and how many.'''",
            "ground_truth_code": "def total(x):\n    return np.sum(squares(x)), len(x)",
            "test_cases": [
                "from scicode.compare.cmp import cmp_tuple_or_list\n"
                "assert cmp_tuple_or_list(total([1, 2, 3]), target)",
                "assert (total([2])[0] > 3) == target",
                "def test():\n    assert total([3])[0] == 9\ntest()",
                "y = np.random.rand(4)\nassert np.allclose(total(y)[0], target)",
            ],
        },
    ],
}


def without_gold(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the row as in the main set, without gold code."""
    return {**row, "sub_steps": [{**step, "ground_truth_code": None} for step in row["sub_steps"]]}


def write_targets(path: Path, tests: dict[str, dict[str, Any]]) -> Path:
    """Writes a file of SciCode's targets: the content of each group by "STEP/testN"; dicts become groups."""
    import h5py  # only SciCode's tests need it

    def fill(group: Any, members: dict[str, Any]) -> None:
        for name, value in members.items():
            if isinstance(value, dict):
                fill(group.create_group(name), value)
            else:
                group.create_dataset(name, data=value)

    with h5py.File(path, "w") as file:
        fill(file, tests)
    return path


contained = pytest.mark.skipif(landlock.abi() < landlock.OLDEST_ABI, reason="needs Landlock (Linux 6.2)")


def rows(*values: Any) -> Rows:
    return Rows(list(values), "made up")


def write(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def mark(task: Task, text: str, index: int = 0, earlier: dict[str, str] | None = None) -> str:
    problem = task.problems[index]
    found = task.find(problem, text, earlier or {})
    if found is None:
        return "no answer"
    return "right" if task.check(problem, found[0])[0] else "wrong"
