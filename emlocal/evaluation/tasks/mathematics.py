"""Questions with one right answer: GSM8K, MATH-500, AMC, AIME, Minerva, OlympiadBench, or a similar file.

Data sets name the question and the answer differently; `QUESTION` and `ANSWER` list the known names. The
prompt is the one that most published figures use (notes of the paper's code: eval/…/system_prompt.md).

Two answers are equal if their notation is, as for votes and rewards, or else if math-verify says so.
math-verify uses sympy to compute what models write, and 9^{9^{9^9}} takes endless time and memory. So it runs
in a process of its own, which is ended and replaced when an answer takes too long.
"""

import json
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Mapping
from fractions import Fraction
from importlib.metadata import version
from itertools import combinations
from math import ceil
from types import TracebackType
from typing import Self

from emlocal.answers.finding import extract, find
from emlocal.answers.gold import gold
from emlocal.answers.meaning import canonical
from emlocal.answers.notation import latex, plain
from emlocal.errors import EmlocalError, UsageError
from emlocal.evaluation.tasks.task import Problem, Row, Rows, Task, text_of
from emlocal.generation.dialogue import text_of as said_in
from emlocal.questions.asked import ANSWER, FIELDS, TEXTS, field_of, system_of, turns, with_own_system

SECONDS = 20.0
"""Time limit of one comparison; undecided answers count as not equal. Nearly all take milliseconds."""
LONGEST = 1000
"""Maximum number of characters of an answer that is compared by meaning."""
_LONGEST_PRODUCT = 2
_DATE_OR_TIME = re.compile(r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$|[0-9] ?[ap]\.?m\.?$", re.IGNORECASE)
_BASED = re.compile(r"[0-9A-Z]+_\(?([0-9]+)\)?")
_START_SECONDS = 60.0  # includes the import of sympy
_ARROW = re.compile(r"[-=]+>")
_ORDER = re.compile(r"[<>≤≥≠]|\\(?:leq?(?:slant)?|geq?(?:slant)?|lt|gt|neq?)(?![A-Za-z])")
"""Relations other than equality that math-verify reads if they have two sides."""
_OTHER_ORDER = re.compile(
    r"[≪≫≮≯≰≱≲≳∉]|\\(?:not(?:in)?|ll|gg|[lg]eqq|n[lg]eq(?:slant|q)?|nless|ngtr|lesssim|gtrsim|prec|succ)"
    r"(?![A-Za-z])"
)
_ONE_SIDED = re.compile(rf"(?:^|[,;({{$])\s*(?:{_ORDER.pattern})|(?:{_ORDER.pattern})\s*(?:$|[,;)}}$])")
_EQUALS = re.compile(r"(?<![<>=!:\\])=(?![=>])")
_PLAIN_NUMBER = re.compile(r"\s*[-+]?[0-9]{1,99}(?:\.([0-9]{1,99}))?\s*")


class MathJudge:
    """Compares answers. Use it as a context manager or close it, because it may hold a process."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._worker: subprocess.Popen[bytes] | None = None
        self.undecided = 0
        """Number of comparisons that took too long."""

    def equal(self, gold: str, answer: str) -> bool:
        """Whether the answer means the same as the gold answer.

        docs/evaluation.md lists cases on which people differ. Answers that votes call equal are equal. An
        answer that says more than a value is not equal to that value: a bound (\\leq 5), or two numbers (4 =
        5). Raises EmlocalError if math-verify cannot run.
        """
        if canonical(gold) == canonical(answer):
            return True
        if max(len(gold), len(answer)) > LONGEST or _other_base(gold, answer):
            return False
        if _contradicts_itself(answer) or (_is_bound(answer) and not _is_bound(gold)):
            return False
        return not _is_text(gold) and not _is_unread(gold) and self._ask(latex(gold), latex(answer))

    def _ask(self, gold: str, answer: str) -> bool:
        worker = self._started()
        assert worker.stdin is not None
        worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
        worker.stdin.flush()
        said = self._line(worker, self.seconds)
        if not said:  # it ran out of time or memory
            self.undecided += 1
            self.close()
            return False
        return bool(json.loads(said))

    def _started(self) -> subprocess.Popen[bytes]:
        if self._worker is not None and self._worker.poll() is not None:
            self.close()  # the timer ended it just as it answered
        if self._worker is None:
            self._worker = subprocess.Popen(
                [sys.executable, "-P", "-m", "emlocal.evaluation.math_worker", str(ceil(self.seconds) + 1)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C must not reach it: it would judge an answer wrong
            )
            if self._line(self._worker, _START_SECONDS).strip() != b"ready":
                self.close()
                raise EmlocalError("math-verify cannot be started", "pip install 'emlocal[eval]'")
        return self._worker

    def _line(self, worker: subprocess.Popen[bytes], seconds: float) -> bytes:
        """Reads the worker's next line; empty if it ends, or if `seconds` pass and it is killed."""
        assert worker.stdout is not None
        timer = threading.Timer(seconds, worker.kill)
        timer.start()
        try:
            return worker.stdout.readline()
        finally:
            timer.cancel()
            timer.join()

    def close(self) -> None:
        """Ends the process."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_text(gold: str) -> bool:
    """Whether the gold answer is words, a date or a time.

    math-verify reads those as products of letters ("Mary" = "Army") or as differences. Words of one or two
    letters may be products: xy = yx.
    """
    key = canonical(gold)
    words = isinstance(key, tuple) and key[0] == "words" and len(key[1]) > _LONGEST_PRODUCT
    return words or _DATE_OR_TIME.search(plain(gold)) is not None


def _is_bound(text: str) -> bool:
    """Whether the text has a relation other than equality.

    math-verify drops a one-sided one: it reads \\leq 5 as 5.
    """
    text = _ARROW.sub(" ", text)
    return _ORDER.search(text) is not None or _OTHER_ORDER.search(text) is not None


def _is_unread(gold: str) -> bool:
    """Whether math-verify would drop a relation of the gold answer.

    It drops one-sided relations and those that it does not know.
    """
    gold = _ARROW.sub(" ", gold)
    return _ONE_SIDED.search(gold) is not None or _OTHER_ORDER.search(gold) is not None


def _contradicts_itself(answer: str) -> bool:
    """Whether the answer equates two plain numbers that differ by more than rounding.

    math-verify uses only the last number. If a side is more than a number (2 + 2 = 5, 0.5 = 50%), the last
    side counts here too.
    """
    matches = [_PLAIN_NUMBER.fullmatch(side) for side in _EQUALS.split(answer)]
    numbers = [(Fraction(match[0].strip()), len(match[1] or "")) for match in matches if match]
    return any(abs(a - b) * 10 ** min(m, n) >= 1 for (a, m), (b, n) in combinations(numbers, 2))


def _other_base(gold: str, answer: str) -> bool:
    """Whether the two are numerals of different bases, 2516_8 and 2516_9; math-verify drops the base."""
    bases = [_BASED.fullmatch(plain(text)) for text in (gold, answer)]
    return all(bases) and len({based[1] for based in bases if based}) > 1


SOLUTION = ("solution",)
"""A worked solution; its \\boxed is the answer if a row has no separate answer (Minerva)."""
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
_FIRST_JUDGE = 4


class MathTask(Task):
    """Questions whose answers are compared by meaning."""

    def __init__(self, name: str, rows: Rows) -> None:
        """Makes the task.

        Raises UsageError for a row without question or answer, or with an answer that nothing can equal.
        """
        problems = [_problem(rows, index) for index in range(len(rows))]
        super().__init__(name, problems, rows)
        self.system = SYSTEM
        self._judge = MathJudge()

    @property
    def judge(self) -> str:
        return f"math {_FIRST_JUDGE}, math-verify {version('math-verify')}"

    def find(self, problem: Problem, text: str, earlier: Mapping[str, str]) -> tuple[str, str] | None:
        found = find(text)
        return None if found is None else (found.text, found.how)

    def check(self, problem: Problem, found: str) -> tuple[bool, str]:
        before = self._judge.undecided
        equal = self._judge.equal(problem.answer, found)
        return equal, "out of time" if self._judge.undecided > before else ""

    def close(self) -> None:
        self._judge.close()


def gold_of(row: Row) -> str | None:
    """Returns a row's answer, or the last box of its solution; None if there is neither.

    Raises ValueError for an answer that is neither text nor number.
    """
    answer = text_of(row, ANSWER)
    if answer is not None:
        return gold(answer)
    solution = text_of(row, SOLUTION)
    return None if solution is None else extract(solution, "boxed")


def question_of(row: Row) -> str | None:
    """Returns a row's question; None if there is none. A system text of the row's own comes before it.

    Raises ValueError for a conversation of several turns, and for messages that are not texts.
    """
    name = field_of(row)
    if system_of(row) is None and (name is None or (name in TEXTS and not isinstance(row[name], list))):
        return text_of(row, TEXTS)
    if name is None:
        return None
    try:
        said = with_own_system(turns(row, name, cut=True), system_of(row))
    except UsageError as why:
        raise ValueError(why.message) from why
    if [message["role"] for message in said if message["role"] != "system"] != ["user"]:
        raise ValueError(f"{name!r} is not one question: it has several turns")
    return "\n\n".join(map(said_in, said))


def _problem(rows: Rows, index: int) -> Problem:
    row, where = rows[index], rows.where(index)
    try:
        question, answer = question_of(row), gold_of(row)
    except ValueError as why:
        raise UsageError(f"{where}: {why}", "write it as a text, or delete the row") from why
    if question is None or answer is None:
        raise UsageError(
            f"{where} has no {'question' if question is None else 'answer'}",
            f"write a row as an object with one of {', '.join(FIELDS)}, and one of {', '.join(ANSWER)}",
        )
    fault = _fault(answer)
    if fault:
        raise UsageError(
            f"{where} has an answer {fault} that no answer of a model can equal", "delete the row"
        )
    return Problem(rows.ids[index], question, answer)


def _fault(answer: str) -> str | None:
    """Returns the reason why nothing can equal a gold answer, or None."""
    if len(answer) > LONGEST:
        return f"of {len(answer):,} characters (at most {LONGEST:,} can be compared)"
    control = next(
        (char for char in answer if unicodedata.category(char) == "Cc" and not char.isspace()), None
    )
    return None if control is None else f"with the control character U+{ord(control):04X}"
