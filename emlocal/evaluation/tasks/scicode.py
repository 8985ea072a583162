"""SciCode (Tian et al. 2024, arXiv 2407.13168): problems in steps, each a function that uses earlier ones.

As in the official protocol, the model builds on its own earlier functions, and the prompt includes the
background. The development problems have gold code, from which targets are computed (`scicode_targets`). The
main problems have none: their targets come from an official file (`scicode_h5`) and are compared in the
official way (`scicode_official`). The prompt has the official order but our wording, so figures compare
methods here and are not comparable with the leaderboard.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from emlocal.answers.programs import code_of
from emlocal.errors import UsageError
from emlocal.evaluation.tasks.scicode_h5 import TargetFile
from emlocal.evaluation.tasks.task import Problem, Rows, Task
from emlocal.sandbox.run import Limits, run

SYSTEM = "You are a scientist who writes correct Python."
_ASK = (
    "Now write the function of this step: complete the header below. Use no other packages than those listed."
    " Do not repeat the functions above, and write no tests. Answer with one code block."
)
_FIRST_JUDGE = 2
_DEFINED = re.compile(r"^(?:def|class)\s+\w+", re.MULTILINE)
_TARGETS = Path(__file__).with_name("scicode_targets.py")
_OFFICIAL = Path(__file__).with_name("scicode_official.py")
_GIVEN = ("13.6", "62.1", "76.3")
"""Steps that the official protocol does not ask; later steps get their code."""
LIMITS = Limits(seconds=300.0, memory=8 << 30)
"""Gold code alone takes up to a minute and 3 GB in some steps. The official limit is 1,800 s."""


@dataclass(frozen=True)
class _Step:
    """A step of a problem."""

    problem: str
    number: int
    """Number of the step, from 0."""
    text: str
    header: str
    definition: str
    """Start of the definition: "def f"."""
    gold: str
    """Gold code; empty if unknown."""
    tests: tuple[str, ...]
    dependencies: str
    given: bool
    """Whether the step is not asked; its gold code then replaces the model's."""


class SciCodeTask(Task):
    """Functions to write one after the other; judging runs them."""

    runs_code: ClassVar[bool] = True
    votes: ClassVar[bool] = False

    def __init__(
        self,
        rows: Rows,
        limits: Limits = LIMITS,
        targets: TargetFile | None = None,
        given: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Makes the task.

        `targets`: for steps without gold code. `given`: code of given steps whose rows have none, by step.

        Raises UsageError for a problem without steps, one with neither gold code nor targets, and a given
        step without code.
        """
        self._steps = {id_: step for row in rows for id_, step in _steps(row, given)}
        self._introduction = {str(row["problem_id"]): _introduction(row) for row in rows}
        self._targets = targets
        self._from_file = {id_ for id_ in self._steps if not self._has_gold(id_)}
        self._check_targets()
        problems = [
            Problem(id_, f"{step.text}\n\n{step.header}", "\n\n".join(filter(None, (step.gold, *step.tests))))
            for id_, step in self._steps.items()
            if not step.given
        ]
        super().__init__("scicode", problems, rows)
        given_steps, targets_of = _given(self._steps), "" if targets is None else targets.source
        self.source = "; ".join(filter(None, (rows.source, targets_of, given_steps)))
        self.identity = "; ".join(filter(None, (rows.identity, given_steps)))
        self.system = SYSTEM
        self.limits = limits

    @property
    def judge(self) -> str:
        judge = f"scicode {_FIRST_JUDGE}, {self.limits.seconds:g} s, {self.limits.memory:,} bytes"
        return judge if self._targets is None else f"{judge}, targets {self._targets.sha256}"

    def stages(self) -> Sequence[Sequence[Problem]]:
        """Returns all first steps, then all second ones, …"""
        numbers = sorted({self._steps[problem.id].number for problem in self.problems})
        return [
            [problem for problem in self.problems if self._steps[problem.id].number == number]
            for number in numbers
        ]

    def whole(self, problem: Problem) -> str:
        return self._steps[problem.id].problem

    def ask(self, problem: Problem, earlier: Mapping[str, str]) -> str:
        step = self._steps[problem.id]
        parts = [self._introduction[step.problem]]
        if step.number:
            parts.append("The steps so far:")
            for id_, before in self._before(step):
                code = _code(before, earlier.get(id_, "")) or before.header
                parts.append(f"{before.text}\n\n```python\n{code.strip()}\n```")
        parts += [f"The next step:\n\n{step.text}", f"Packages:\n\n```python\n{step.dependencies}\n```", _ASK]
        parts.append(f"```python\n{step.header.rstrip()}\n```")
        return "\n\n".join(parts)

    def find(self, problem: Problem, text: str, earlier: Mapping[str, str]) -> tuple[str, str] | None:
        """Returns the program to run.

        It runs the tests on the answer's names, and on those of the gold code if it is known. Official
        targets are not in it, since they may be large: `check` adds them.
        """
        step = self._steps[problem.id]
        code = code_of(text, step.definition)
        if code is None:
            return None
        before = self._before(step)
        written = (_code(other, earlier.get(id_, "")) or "" for id_, other in before)
        answer = "\n\n".join((step.dependencies, *written, code))
        if problem.id in self._from_file:
            program = [
                _OFFICIAL.read_text(encoding="utf-8"),
                "provide_comparisons()",
                f"run_code({answer!r}, {list(step.tests)!r}, unpacked(packed))",
            ]
            return "\n".join(program), "program"
        gold = "\n\n".join((step.dependencies, *(other.gold for _, other in before), step.gold))
        program = [
            _TARGETS.read_text(encoding="utf-8"),
            "provide_comparisons()",
            f"gold = {{'__name__': 'gold'}}\nexec({gold!r}, gold)",
            f"answer = {{'__name__': 'answer'}}\nexec({answer!r}, answer)",
            f"run_tests({list(step.tests)!r}, gold, answer)",
        ]
        return "\n".join(program), "program"

    def check(self, problem: Problem, found: str) -> tuple[bool, str]:
        if self._targets is not None and problem.id in self._from_file:
            packed = self._targets.packed(problem.id, len(self._steps[problem.id].tests))
            found = f"packed = {packed!r}\n{found}"
        outcome = run(found, self.limits)
        return outcome.passed, "" if outcome.passed else outcome.detail

    def gold(self, problem: Problem) -> str:
        """Returns the gold code of a step; empty if unknown."""
        return self._steps[problem.id].gold

    def _has_gold(self, id_: str) -> bool:
        """Whether the step needs no targets.

        Either it is given, or its code and that of all earlier steps is known.
        """
        step = self._steps[id_]
        return step.given or all(each.gold for each in (step, *(other for _, other in self._before(step))))

    def _check_targets(self) -> None:
        needed = {id_: len(step.tests) for id_, step in self._steps.items() if id_ in self._from_file}
        if needed and self._targets is None:
            raise UsageError(
                f"step {next(iter(needed))} of SciCode has no gold code, so its tests have no targets",
                "use problems_dev.jsonl, whose targets emlocal computes, or add the official test_data.h5"
                " with --targets",
            )
        if self._targets is not None:
            self._targets.check(needed)

    def _before(self, step: _Step) -> list[tuple[str, _Step]]:
        same = ((id_, other) for id_, other in self._steps.items() if other.problem == step.problem)
        return [(id_, other) for id_, other in same if other.number < step.number]


def given_code(folders: Iterable[Path]) -> dict[str, str]:
    """Returns the code of the given steps, each from the first of these folders that has it.

    The official repository has it beside the problems: eval/data/13.6.txt, 62.1.txt, 76.3.txt. Raises
    UsageError for a file that cannot be read.
    """
    paths = {
        step: folder / f"{step}.txt"
        for folder in reversed(list(folders))
        for step in _GIVEN
        if (folder / f"{step}.txt").is_file()
    }
    try:
        return {step: path.read_text(encoding="utf-8") for step, path in paths.items()}
    except (OSError, ValueError) as why:
        raise UsageError(f"the code of SciCode's given steps cannot be read: {why}") from why


def _given(steps: Mapping[str, _Step]) -> str:
    """Names the given steps, with a digest of their code, because prompts depend on it.

    The text is empty if there are none.
    """
    given = {id_: step.gold for id_, step in steps.items() if step.given}
    code = hashlib.sha256("\0".join(given.values()).encode(errors="surrogatepass"))
    return f"{', '.join(given)} given, sha256 {code.hexdigest()}" if given else ""


def _code(step: _Step, text: str) -> str | None:
    """Returns the code of an earlier step: the given code, or the model's."""
    return step.gold if step.given else code_of(text, step.definition)


def _introduction(row: Mapping[str, Any]) -> str:
    return (
        "We solve a scientific problem step by step, each step one Python function.\n\n"
        f"The problem:\n\n{str(row['problem_description_main']).strip()}"
    )


def _steps(row: Mapping[str, Any], given: Mapping[str, str]) -> list[tuple[str, _Step]]:
    try:
        return [
            (str(step["step_number"]), _step(row, step, number, given))
            for number, step in enumerate(row["sub_steps"])
        ]
    except (KeyError, TypeError) as why:
        raise UsageError(
            f"problem {row.get('problem_id')!r} is not a SciCode problem: {why} is missing"
        ) from why


def _step(row: Mapping[str, Any], step: Mapping[str, Any], number: int, given: Mapping[str, str]) -> _Step:
    id_ = str(step["step_number"])
    gold = step.get("ground_truth_code") or given.get(id_)
    if id_ in _GIVEN and not gold:  # asking or omitting it would make later steps fail silently
        raise UsageError(
            f"step {id_} of SciCode is given to the model, but its code is missing",
            f"put {id_}.txt beside the problems, from eval/data of github.com/scicode-bench/SciCode",
        )
    background = str(step["step_background"] or "").strip()
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
        str(gold or ""),
        tuple(map(str, step["test_cases"])),
        str(row["required_dependencies"]).strip(),
        id_ in _GIVEN,
    )
