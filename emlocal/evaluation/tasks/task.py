"""A task: its problems, how each is put to a model, and how an answer is judged."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from emlocal.evaluation.tasks.reading import Rows

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
