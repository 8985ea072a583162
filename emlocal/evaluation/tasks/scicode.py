"""SciCode: problems in steps, each a function that uses those before it (Tian et al. 2024, arXiv 2407.13168).

The model builds on its own earlier functions, as in the official protocol, and is told the background. The
official targets are a file that is not in the repository; the development problems have gold code instead,
from which targets are computed (`scicode_targets`). The order of the prompt is the official one's; the words
are ours, so figures are comparable among methods here and not with the leaderboard.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from emlocal.errors import UsageError
from emlocal.evaluation.sandbox.run import Limits, run
from emlocal.evaluation.tasks.programs import code_with
from emlocal.evaluation.tasks.reading import Rows
from emlocal.evaluation.tasks.task import Problem, Task

SYSTEM = "You are a scientist who writes correct Python."
_ASK = (
    "Now write the function of this step: complete the header below. Use no other packages than those listed."
    " Do not repeat the functions above, and write no tests. Answer with one code block."
)
_FIRST_JUDGE = 1
_DEFINED = re.compile(r"^(?:def|class)\s+\w+", re.MULTILINE)
_TARGETS = Path(__file__).with_name("scicode_targets.py")
LIMITS = Limits(seconds=300.0, memory=8 << 30)
"""Gold code alone takes up to a minute and 3 GB in some steps; the official limit is 1,800 s."""


@dataclass(frozen=True)
class _Step:
    """A step of a problem."""

    problem: str
    number: int
    """From 0."""
    text: str
    header: str
    definition: str
    """ "def f" """
    gold: str
    tests: tuple[str, ...]
    dependencies: str


class SciCodeTask(Task):
    """Functions to be written one after the other; what is written is run."""

    runs_code: ClassVar[bool] = True
    votes: ClassVar[bool] = False

    def __init__(self, rows: Rows, limits: Limits = LIMITS) -> None:
        """Raises UsageError for a problem without steps or gold code."""
        self._steps = {id_: step for row in rows for id_, step in _steps(row)}
        self._introduction = {str(row["problem_id"]): _introduction(row) for row in rows}
        problems = [
            Problem(id_, f"{step.text}\n\n{step.header}", "\n\n".join((step.gold, *step.tests)))
            for id_, step in self._steps.items()
        ]
        super().__init__("scicode", problems, rows)
        self.system = SYSTEM
        self.limits = limits

    @property
    def judge(self) -> str:
        return f"scicode {_FIRST_JUDGE}, {self.limits.seconds:g} s, {self.limits.memory:,} bytes"

    def stages(self) -> Sequence[Sequence[Problem]]:
        """All first steps, then all second ones, …"""
        longest = max(step.number for step in self._steps.values())
        return [
            [problem for problem in self.problems if self._steps[problem.id].number == number]
            for number in range(longest + 1)
        ]

    def whole(self, problem: Problem) -> str:
        return self._steps[problem.id].problem

    def ask(self, problem: Problem, earlier: Mapping[str, str]) -> str:
        step = self._steps[problem.id]
        parts = [self._introduction[step.problem]]
        if step.number:
            parts.append("The steps so far:")
            for id_, before in self._before(step):
                code = code_with(earlier.get(id_, ""), before.definition) or before.header
                parts.append(f"{before.text}\n\n```python\n{code.strip()}\n```")
        parts += [f"The next step:\n\n{step.text}", f"Packages:\n\n```python\n{step.dependencies}\n```", _ASK]
        parts.append(f"```python\n{step.header.rstrip()}\n```")
        return "\n\n".join(parts)

    def find(self, problem: Problem, text: str, earlier: Mapping[str, str]) -> tuple[str, str] | None:
        """The program to run: gold code and answer in names of their own, and the tests on both."""
        step = self._steps[problem.id]
        code = code_with(text, step.definition)
        if code is None:
            return None
        before = self._before(step)
        gold = "\n\n".join((step.dependencies, *(other.gold for _, other in before), step.gold))
        written = (code_with(earlier.get(id_, ""), other.definition) or "" for id_, other in before)
        answer = "\n\n".join((step.dependencies, *written, code))
        program = [
            _TARGETS.read_text(encoding="utf-8"),
            "provide_comparisons()",
            f"gold = {{'__name__': 'gold'}}\nexec({gold!r}, gold)",
            f"answer = {{'__name__': 'answer'}}\nexec({answer!r}, answer)",
            f"run_tests({list(step.tests)!r}, gold, answer)",
        ]
        return "\n".join(program), "program"

    def check(self, problem: Problem, found: str) -> tuple[bool, str]:
        outcome = run(found, self.limits)
        return outcome.passed, "" if outcome.passed else outcome.detail

    def gold(self, problem: Problem) -> str:
        """The right code of a step."""
        return self._steps[problem.id].gold

    def _before(self, step: _Step) -> list[tuple[str, _Step]]:
        same = ((id_, other) for id_, other in self._steps.items() if other.problem == step.problem)
        return [(id_, other) for id_, other in same if other.number < step.number]


def _introduction(row: Mapping[str, Any]) -> str:
    return (
        "We solve a scientific problem step by step, each step one Python function.\n\n"
        f"The problem:\n\n{str(row['problem_description_main']).strip()}"
    )


def _steps(row: Mapping[str, Any]) -> list[tuple[str, _Step]]:
    try:
        return [
            (str(step["step_number"]), _step(row, step, number))
            for number, step in enumerate(row["sub_steps"])
        ]
    except (KeyError, TypeError) as why:
        raise UsageError(f"problem {row.get('problem_id')!r} is none of SciCode: {why} is missing") from why


def _step(row: Mapping[str, Any], step: Mapping[str, Any], number: int) -> _Step:
    gold = step.get("ground_truth_code")
    if not gold:
        raise UsageError(
            f"step {step['step_number']} of SciCode has no gold code: its tests have no targets then",
            "use problems_dev.jsonl, whose targets can be computed",
        )
    background = str(step["step_background"]).strip()
    text = str(step["step_description_prompt"]).strip() + (f"\n\n{background}" if background else "")
    header = str(step["function_header"])
    defined = _DEFINED.search(header)
    if defined is None:
        raise UsageError(f"step {step['step_number']} of SciCode has no function header")
    return _Step(
        str(row["problem_id"]),
        number,
        text,
        header,
        " ".join(defined[0].split()),
        str(gold),
        tuple(map(str, step["test_cases"])),
        str(row["required_dependencies"]).strip(),
    )
