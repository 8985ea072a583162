"""What a task is, and the rows that its problems come from: of .jsonl, .json, either with .gz, or the hub."""

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
from typing import Any, ClassVar, Literal, Self

from emlocal.errors import EmlocalError, UsageError
from emlocal.models.hub import hub_rows

Row = Mapping[str, Any]
_SUFFIXES = (".jsonl", ".json", ".ndjson")
_LARGEST = 256 << 20
"""Bytes of a file of problems, unpacked. It is held in memory, about three times; the sets here have 4 MB."""


class Rows(list[Row]):
    """Rows with their names, and where they come from."""

    def __init__(
        self, rows: Sequence[Row], source: str, digest: str | None = None, lines: Sequence[int] | None = None
    ) -> None:
        """`digest`: the SHA-256 of the file, in hexadecimal; None: the source says it all.

        `lines`: where each row stands in the file, from 1; None where it has no lines.
        """
        super().__init__(rows)
        self._lines = lines
        self.source = source if digest is None else f"{source}, sha256 {digest}"
        """For people: the file's name and digest; of the hub's the name."""
        self.identity = digest or source
        """What is the same where the rows are."""
        self.ids = ids(rows)

    def where(self, index: int) -> str:
        """Which row this is, for a message: "problem 2 (line 3)"."""
        name = f"problem {index + 1:,}"
        return name if self._lines is None else f"{name} (line {self._lines[index]:,})"

    def first(self, limit: int | None) -> Self:
        """The first rows, under the names that they have among all."""
        if limit is not None:
            self.ids = self.ids[:limit]
            del self[limit:]
        return self


def read_rows(path: Path) -> Rows:
    """The objects of a file.

    Raises UsageError for a file that is missing, empty, larger than 256 MiB, or holds something else.
    """
    try:
        raw = _read(path)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}", "give a .jsonl or .json file with --data") from None
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why
    names = path.with_suffix("") if path.suffix == ".gz" else path
    if names.suffix not in _SUFFIXES:
        raise UsageError(f"{path} is neither JSONL nor JSON", f"its name must end in {', '.join(_SUFFIXES)}")
    try:
        text = (_unpacked(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
        numbered = None if names.suffix == ".json" else _lines(text)
        rows = _listed(json.loads(text)) if numbered is None else list(numbered.values())
    except (ValueError, EOFError, OSError, RecursionError) as why:
        raise UsageError(f"{path} cannot be read: {why}") from why
    if not rows:
        raise UsageError(f"{path} holds no problems")
    for number, row in enumerate(rows, 1):
        if not _is_unicode(row):
            raise UsageError(f"problem {number:,} of {path} holds half a surrogate pair, which is no text")
    lines = None if numbered is None else list(numbered)
    return Rows(rows, path.name, hashlib.sha256(raw).hexdigest(), lines)


def _read(path: Path) -> bytes:
    """What is in a file. Raises UsageError for a pipe, a device or a folder, and for too large a file."""
    path = path.expanduser()
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe that nobody writes to would be waited for
        raise UsageError(f"{path} is not a regular file", "give a .jsonl or .json file with --data")
    if status.st_size > _LARGEST:
        raise UsageError(f"{path} has more than {_LARGEST >> 20} MiB", "split it into several files")
    return path.read_bytes()


def _unpacked(raw: bytes) -> bytes:
    """Raises ValueError where it unpacks to too much; nothing of it is kept until that is known."""
    size = 0
    with gzip.open(io.BytesIO(raw)) as file:
        while chunk := file.read(1 << 20):
            size += len(chunk)
            if size > _LARGEST:
                raise ValueError(f"it unpacks to more than {_LARGEST >> 20} MiB")
    return gzip.decompress(raw)


def hub(name: str, split: str, limit: int | None, config: str | None = None) -> Rows:
    """The first rows of a dataset of the hub. Raises EmlocalError as `hub_rows` does."""
    return Rows(hub_rows(name, split, limit, config), f"{name}:{split} of the hub")


def _is_unicode(row: Row) -> bool:
    """JSON can write what is no Unicode text, "\\ud800"; no tokenizer, file or page takes it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(text: str) -> dict[int, Row]:
    """The rows by the numbers of their lines, from 1; empty lines are passed over."""
    rows: dict[int, Row] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as why:
                raise ValueError(f"line {number:,}, character {why.pos + 1:,}: {why.msg}") from why
            if not isinstance(value, dict):
                raise ValueError(f"line {number:,} is no JSON object")
            rows[number] = value
    return rows


def _listed(value: Any) -> list[Row]:
    """A list of objects; or, as some write tables, an object of columns: {row: value}, or lists."""
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if isinstance(value, dict) and value and all(isinstance(column, dict) for column in value.values()):
        keys = list(next(iter(value.values())))
        return [{name: column.get(key) for name, column in value.items()} for key in keys]
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return value
    raise ValueError("it is no list of JSON objects")


def text_of(row: Row, names: Sequence[str]) -> str | None:
    """The first of these fields that has a text or a number in it, stripped; a list's texts with commas.

    Raises ValueError for a field with a number that is not finite, or a list of other things than texts.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, list):
            if not all(isinstance(part, str) for part in value):
                raise ValueError(f"{name!r} is a list of other things than texts")
            value = ", ".join(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name!r} is {value}: it must be a finite number")
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return None


def ids(rows: Sequence[Row]) -> list[str]:
    """A name for each row: its own where all have one and none twice, else their numbers from 1."""
    for field in ("id", "unique_id", "task_id", "question_id"):
        own = [row.get(field) for row in rows]
        if all(isinstance(name, str | int) for name in own) and len({str(name) for name in own}) == len(own):
            return [str(name) for name in own]
    return [str(number) for number in range(1, len(rows) + 1)]


Mark = Literal["right", "wrong", "no answer"]
"""`no answer`: nothing in the text has the form of one. It counts as wrong, and is counted apart."""


@dataclass(frozen=True)
class Problem:
    """One question."""

    id: str
    """Unique in its task; it also names the question's random draws."""
    question: str
    """As the model is asked, in full or up to what earlier answers add to it."""
    answer: str
    """The right answer, as it is shown and as verdicts know it: a gold answer, or tests."""


@dataclass(frozen=True)
class Verdict:
    """What an answer is worth."""

    mark: Mark
    answer: str | None = None
    """What was found in the text and judged."""
    detail: str = ""
    """How it was found, or what its tests said."""

    @property
    def right(self) -> bool:
        return self.mark == "right"


class Task(ABC):
    """Problems of one kind."""

    runs_code: ClassVar[bool] = False
    """Judging runs what the model wrote."""
    votes: ClassVar[bool] = True
    """Answers of several samples can be compared, so that they can vote."""

    def __init__(self, name: str, problems: Sequence[Problem], rows: Rows) -> None:
        """`rows`: what the problems were made of."""
        self.name = name
        self.problems = problems
        self.source = rows.source
        """Where the problems come from, and their digest, for people."""
        self.identity = rows.identity
        """The same where the problems are."""
        self.system: str | None = None
        """What the model is told beforehand, whoever asks."""

    def stages(self) -> Sequence[Sequence[Problem]]:
        """The problems in groups, each of which may build on answers to those before it."""
        return [self.problems]

    def ask(self, problem: Problem, earlier: Mapping[str, str]) -> str:
        """What the user says. `earlier`: by problem id, the texts answered in the stages before."""
        return problem.question

    def whole(self, problem: Problem) -> str:
        """The id of what the problem is a part of: itself, unless problems come in steps."""
        return problem.id

    def title(self, problem: Problem) -> str:
        """What tells the problem from the others, its beginning first."""
        return problem.question

    @abstractmethod
    def find(self, problem: Problem, text: str, earlier: Mapping[str, str]) -> tuple[str, str] | None:
        """What is to be judged in a model's text, and how it was found; None where nothing is."""

    @abstractmethod
    def check(self, problem: Problem, found: str) -> tuple[bool, str]:
        """Whether what was found is right, and what there is to say of it."""

    @property
    @abstractmethod
    def judge(self) -> str:
        """What verdicts depend on besides problem and answer: the judge's version, limits."""

    def close(self) -> None:  # noqa: B027 (few tasks hold anything)
        """Free what judging holds."""

    def digest(self, problem: Problem, found: str) -> str:
        """The name of a verdict: the same for the same answer to the same problem by the same judge."""
        text = "\0".join((self.judge, problem.answer, found))
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
