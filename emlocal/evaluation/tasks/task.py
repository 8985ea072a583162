"""What a task is, and the rows of its problems: from question files or the hub."""

import gzip
import hashlib
import io
import json
import math
import stat
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal, Self, cast

from emlocal.errors import EmlocalError, UsageError
from emlocal.models.hub import hub_rows
from emlocal.questions.files import FORMS, LARGEST, NUMBERED, Form, form_of, is_by_lines, reading, whole
from emlocal.questions.files import rows as rows_of

Row = Mapping[str, Any]


class Rows(list[Row]):
    """Rows with their names and their source."""

    def __init__(
        self, rows: Sequence[Row], source: str, digest: str | None = None, lines: Sequence[int] | None = None
    ) -> None:
        """Names the rows.

        `digest`: the SHA-256 of the file, in hexadecimal; None if the source alone identifies the rows.
        `lines`: each row's line in the file, from 1; None if the file has no lines.
        """
        super().__init__(rows)
        self._lines = lines
        self.source = source if digest is None else f"{source}, sha256 {digest}"
        """Source for people: the file's name and digest, or the name on the hub."""
        self.identity = digest or source
        """Text that is equal for equal rows."""
        self.ids = ids(rows)

    def where(self, index: int) -> str:
        """Names a row for a message: "problem 2 (line 3)"."""
        name = f"problem {index + 1:,}"
        return name if self._lines is None else f"{name} (line {self._lines[index]:,})"

    def first(self, limit: int | None) -> Self:
        """Keeps the first rows, with the names that they have among all."""
        if limit is not None:
            self.ids = self.ids[:limit]
            del self[limit:]
        return self


def read_rows(path: Path) -> Rows:
    """Reads the objects of a file.

    Raises UsageError for a file that is missing, empty, larger than 256 MiB, or of another form.
    """
    try:
        raw = _read(path)
    except FileNotFoundError:
        raise UsageError(
            f"there is no file {path}", "name a .jsonl, .json or .csv file with --data"
        ) from None
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why
    form = form_of(path)
    if form is None:
        raise UsageError(
            f"{path} is not a question file",
            f"rename it to end in {', '.join(f'.{each}' for each in FORMS)}, or .gz",
        )
    with reading(str(path)):
        rows, lines = _parsed(raw, form)
    if not rows:
        raise UsageError(f"{path} has no problems")
    for number, row in enumerate(rows, 1):
        if not _is_unicode(row):
            raise UsageError(f"problem {number:,} of {path} has half of a surrogate pair, which is not text")
    return Rows(rows, path.name, hashlib.sha256(raw).hexdigest(), lines)


def _read(path: Path) -> bytes:
    """Reads a file. Raises UsageError for a pipe, a device or a folder, and for a file that is too large."""
    path = path.expanduser()
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe that nobody writes to would block
        raise UsageError(f"{path} is not a regular file", "name a .jsonl, .json or .csv file with --data")
    if status.st_size > LARGEST:
        raise UsageError(f"{path} has more than {LARGEST >> 20} MiB", "split it into several files")
    return path.read_bytes()


def _parsed(raw: bytes, form: Form) -> tuple[list[Row], list[int] | None]:
    """Returns the rows and their lines, if the file has lines. Raises ValueError."""
    content = whole(cast(BinaryIO, gzip.GzipFile(fileobj=io.BytesIO(raw)))) if raw[:2] == b"\x1f\x8b" else raw
    if is_by_lines(io.BytesIO(content), form):
        numbered = _lines(content.decode("utf-8-sig"))
        return list(numbered.values()), list(numbered)
    found = list(rows_of(io.BytesIO(content), form))
    if not all(isinstance(value, dict) for _, value in found):
        raise ValueError("it is not a list of JSON objects")
    by_line = NUMBERED[form] == "line"
    return [value for _, value in found], [number for number, _ in found] if by_line else None


def hub(name: str, split: str, limit: int | None, config: str | None = None) -> Rows:
    """Returns the first rows of a dataset on the hub. Raises EmlocalError as `hub_rows` does."""
    return Rows(hub_rows(name, split, limit, config), f"{name}:{split} of the hub")


def _is_unicode(row: Row) -> bool:
    """Whether all texts are Unicode.

    JSON can express half a surrogate pair, "\\ud800"; tokenizers and files cannot.
    """
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(text: str) -> dict[int, Row]:
    """Parses the rows, by line number from 1; skips empty lines."""
    rows: dict[int, Row] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as why:
                raise ValueError(f"line {number:,}, character {why.pos + 1:,}: {why.msg}") from why
            if not isinstance(value, dict):
                raise ValueError(f"line {number:,} is not a JSON object")
            rows[number] = value
    return rows


def text_of(row: Row, names: Sequence[str]) -> str | None:
    """Returns the first of these fields with a text or number, stripped; joins a list's texts with commas.

    Raises ValueError for a number that is not finite, or a list with other items than texts.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, list):
            if not all(isinstance(part, str) for part in value):
                raise ValueError(f"{name!r} is a list whose items are not all texts")
            value = ", ".join(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name!r} is {value}: it must be a finite number")
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return None


def ids(rows: Sequence[Row]) -> list[str]:
    """Names the rows: by their own ids if all have one and they differ, otherwise by number from 1."""
    for field in ("id", "unique_id", "task_id", "question_id"):
        own = [row.get(field) for row in rows]
        if all(isinstance(name, str | int) for name in own) and len({str(name) for name in own}) == len(own):
            return [str(name) for name in own]
    return [str(number) for number in range(1, len(rows) + 1)]


Mark = Literal["right", "wrong", "no answer"]
"""`no answer`: the text contains no answer. It counts as wrong, and is also counted separately."""


@dataclass(frozen=True)
class Problem:
    """One question."""

    id: str
    """Unique in its task; it also determines the question's random draws."""
    question: str
    """The question as the model gets it, apart from any earlier answers."""
    answer: str
    """The right answer, for display and in verdicts: a gold answer, or tests."""


@dataclass(frozen=True)
class Verdict:
    """The judgement of an answer."""

    mark: Mark
    answer: str | None = None
    """The answer that was found in the text and judged."""
    detail: str = ""
    """How the answer was found, or what its tests reported."""

    @property
    def right(self) -> bool:
        return self.mark == "right"


class Task(ABC):
    """Problems of one kind."""

    runs_code: ClassVar[bool] = False
    """Whether judging runs code that the model wrote."""
    votes: ClassVar[bool] = True
    """Whether answers of several samples can be compared, so that they can vote."""

    def __init__(self, name: str, problems: Sequence[Problem], rows: Rows) -> None:
        """`rows`: the rows that the problems were made from."""
        self.name = name
        self.problems = problems
        self.source = rows.source
        """Source and digest of the problems, for people."""
        self.identity = rows.identity
        """Text that is equal for equal problems."""
        self.system: str | None = None
        """The task's system message."""

    def stages(self) -> Sequence[Sequence[Problem]]:
        """Returns the problems in groups; a group may build on the answers to earlier ones."""
        return [self.problems]

    def ask(self, problem: Problem, earlier: Mapping[str, str]) -> str:
        """Returns the user's message. `earlier`: by problem id, the answers of earlier stages."""
        return problem.question

    def whole(self, problem: Problem) -> str:
        """Returns the id of the whole problem: the problem's own, unless problems have steps."""
        return problem.id

    def title(self, problem: Problem) -> str:
        """Returns a text that tells the problem from the others, its distinctive part first."""
        return problem.question

    @abstractmethod
    def find(self, problem: Problem, text: str, earlier: Mapping[str, str]) -> tuple[str, str] | None:
        """Finds the answer to judge in a model's text; returns it and how it was found, or None."""

    @abstractmethod
    def check(self, problem: Problem, found: str) -> tuple[bool, str]:
        """Whether the answer is right, with a remark."""

    @property
    @abstractmethod
    def judge(self) -> str:
        """Identifies what verdicts depend on besides problem and answer: the judge's version and limits."""

    def close(self) -> None:  # noqa: B027 (few tasks hold anything)
        """Releases the judge's resources."""

    def digest(self, problem: Problem, found: str) -> str:
        """Returns a verdict's key: equal for the same answer to the same problem by the same judge."""
        text = "\0".join((self.judge, problem.answer, found))
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
