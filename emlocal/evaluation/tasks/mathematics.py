"""Questions with one right answer: GSM8K, MATH-500, AMC, AIME, Minerva, OlympiadBench, or any such file.

What the sets call question and answer differs; `QUESTION` and `ANSWER` are the names that are known. The
prompt is the one most published figures use (notes of the paper's code: eval/…/system_prompt.md).
"""

from collections.abc import Mapping
from importlib.metadata import version

from emlocal.errors import UsageError
from emlocal.evaluation.math_judge import MathJudge
from emlocal.evaluation.tasks.reading import Row, Rows, text_of
from emlocal.evaluation.tasks.task import Problem, Task
from emlocal.methods.extraction import extract, find_answer

QUESTION = ("prompt", "question", "problem", "Problem", "Question")
ANSWER = ("answer", "final_answer", "expected_answer", "target", "Answer")
SOLUTION = ("solution",)
"""A worked one, whose \\boxed is the answer where a row has no answer by itself (Minerva)."""
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
_FIRST_JUDGE = 2


class MathTask(Task):
    """Questions whose answers are compared by what they mean."""

    def __init__(self, name: str, rows: Rows) -> None:
        """Raises UsageError for a row without question or answer."""
        named = zip(rows.ids, rows, strict=True)
        problems = [_problem(id_, row, number) for number, (id_, row) in enumerate(named, 1)]
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
    """The answer that a row gives: GSM8K's stands after ####, Minerva's in the solution's last box."""
    answer = text_of(row, ANSWER)
    if answer is not None:
        marked = extract(answer, "last-number") if "####" in answer else None
        return marked or extract(answer, "boxed") or answer.strip("$")
    solution = text_of(row, SOLUTION)
    return None if solution is None else extract(solution, "boxed")


def _problem(id_: str, row: Row, number: int) -> Problem:
    question, answer = text_of(row, QUESTION), gold(row)
    if question is None or answer is None:
        raise UsageError(
            f"problem {number:,} has no {'question' if question is None else 'answer'}",
            f"a row is an object with one of {', '.join(QUESTION)}, and one of {', '.join(ANSWER)}",
        )
    return Problem(id_, question, answer)
