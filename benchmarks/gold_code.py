"""Checks that right programs pass in the sandbox: the solutions that come with HumanEval and SciCode.

    python benchmarks/gold_code.py humaneval HumanEval.jsonl.gz
    python benchmarks/gold_code.py scicode problems_dev.jsonl

Each solution is treated like an answer: found in a text and run with its tests. Prints those that fail.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from emlocal.evaluation.tasks import open_task
from emlocal.evaluation.tasks.programs import ProgramTask
from emlocal.evaluation.tasks.scicode import SciCodeTask
from emlocal.evaluation.tasks.task import Problem, Task, read_rows


def solved(task: Task, path: Path) -> Iterator[tuple[Problem, str, dict[str, str]]]:
    """Yields each problem, the text that solves it, and the texts of all problems."""
    if isinstance(task, SciCodeTask):
        texts = {p.id: f"```python\n{task.gold(p)}\n```" for p in task.problems}
    else:
        rows = zip(task.problems, read_rows(path), strict=True)
        texts = {p.id: f"```python\n{row['prompt']}{row['canonical_solution']}\n```" for p, row in rows}
    for problem in task.problems:
        yield problem, texts[problem.id], texts


def main() -> None:
    """Prints the solutions that fail, and the number that pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["humaneval", "scicode"])
    parser.add_argument("data", type=Path)
    chosen = parser.parse_args()
    task = open_task(chosen.task, chosen.data)
    assert isinstance(task, ProgramTask | SciCodeTask)
    right = 0
    for problem, text, texts in solved(task, chosen.data):
        found = task.find(problem, text, texts)
        passed, said = (False, "not found") if found is None else task.check(problem, found[0])
        right += passed
        if not passed:
            print(f"{problem.id}: {said}", flush=True)
    print(f"{right} of {len(task.problems)} pass")


if __name__ == "__main__":
    main()
