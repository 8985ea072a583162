"""Questions with one right answer: GSM8K, MATH-500, AMC, AIME, Minerva, OlympiadBench, or any such file.

What the sets call question and answer differs; `QUESTION` and `ANSWER` are the names that are known. The
prompt is the one most published figures use (notes of the paper's code: eval/…/system_prompt.md).
"""

import unicodedata
from collections.abc import Mapping
from importlib.metadata import version

from emlocal.errors import UsageError
from emlocal.evaluation.math_judge import LONGEST, MathJudge
from emlocal.evaluation.tasks.reading import Row, Rows, text_of
from emlocal.evaluation.tasks.task import Problem, Task
from emlocal.methods.answers import extract, find_answer

QUESTION = ("prompt", "question", "problem", "Problem", "Question")
ANSWER = ("answer", "final_answer", "expected_answer", "target", "Answer")
SOLUTION = ("solution",)
"""A worked one, whose \\boxed is the answer where a row has no answer by itself (Minerva)."""
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
_FIRST_JUDGE = 3


class MathTask(Task):
    """Questions whose answers are compared by what they mean."""

    def __init__(self, name: str, rows: Rows) -> None:
        """Raises UsageError for a row without question or answer, or with one that no answer can equal."""
        problems = [_problem(rows, index) for index in range(len(rows))]
        super().__init__(name, problems, rows)
        self.system = SYSTEM
        self._judge = MathJudge()

    @property
    def judge(self) -> str:
        return f"math {_FIRST_JUDGE}, math-verify {version('math-verify')}"

    def find(self, problem: Problem, text: str, earlier: Mapping[str, str]) -> tuple[str, str] | None:
        return find_answer(text)

    def check(self, problem: Problem, found: str) -> tuple[bool, str]:
        before = self._judge.undecided
        equal = self._judge.equal(problem.answer, found)
        return equal, "not decided in time" if self._judge.undecided > before else ""

    def close(self) -> None:
        self._judge.close()


def gold(row: Row) -> str | None:
    """The answer that a row gives: GSM8K's stands after ####, Minerva's in the solution's last box.

    None where there is none. Raises ValueError for an answer that is no text or number.
    """
    answer = text_of(row, ANSWER)
    if answer is not None:
        marked = extract(answer, "last-number") if "####" in answer else None
        return marked or extract(answer, "boxed") or answer.strip("$").strip() or None
    solution = text_of(row, SOLUTION)
    return None if solution is None else extract(solution, "boxed")


def _problem(rows: Rows, index: int) -> Problem:
    row, where = rows[index], rows.where(index)
    try:
        question, answer = text_of(row, QUESTION), gold(row)
    except ValueError as why:
        raise UsageError(f"{where}: {why}", "write it as a text, or leave the row out") from why
    if question is None or answer is None:
        raise UsageError(
            f"{where} has no {'question' if question is None else 'answer'}",
            f"a row is an object with one of {', '.join(QUESTION)}, and one of {', '.join(ANSWER)}",
        )
    fault = _fault(answer)
    if fault:
        raise UsageError(f"{where} has an answer {fault}: no model's can equal it", "leave the row out")
    return Problem(rows.ids[index], question, answer)


def _fault(answer: str) -> str | None:
    """Why a gold answer can never be right."""
    if len(answer) > LONGEST:
        return f"of {len(answer):,} characters, where {LONGEST:,} are compared"
    control = next(
        (char for char in answer if unicodedata.category(char) == "Cc" and not char.isspace()), None
    )
    return None if control is None else f"with the control character U+{ord(control):04X}"
