"""What a method is: one file here, with its settings and how it answers; `emlocal.methods` lists them all.

    @dataclass(frozen=True)
    class Twice(Method):
        name: ClassVar[str] = "twice"
        collects: ClassVar[bool] = True

        def answer(self, question: Question) -> Answering:
            [first] = yield [question.job()]
            [second] = yield [question.job(round=1)]
            return Outcome([first, second], second.completions)

Its settings are fields made by `setting(...)`; flags, Python's keywords and eval's specs follow from them. No
numpy here: `emlocal --help` must be quick.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar

from emlocal.errors import UsageError
from emlocal.settings import EM_STEPS, EMStep, SamplingParams, records_of
from emlocal.settings.em import switch_of

if TYPE_CHECKING:
    from emlocal.generation import Completion, Handle, Job, Timings
    from emlocal.methods.asking import Question

_SWITCHES = frozenset(switch_of(step).name for step in EM_STEPS)


@dataclass(frozen=True)
class Outcome:
    """What a method came to."""

    jobs: "Sequence[Handle]"
    """All that it took, in the order in which they were asked."""
    completions: "Sequence[Completion]"
    """What the answer was chosen among, by sample; at least one."""
    index: int = 0
    """Which of them is the answer."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What the method has to say of it, for output rows: values as JSON has them."""
    drafts: Sequence[str] = ()
    """The texts that led to it, each a revision of the one before, and itself; none without revisions."""
    confidence: float | None = None
    """How sure the method is that the answer is right, from 0 to 1, before any calibration; None: it does not
    know more than the scores of the answer say."""
    undecided: bool = False
    """The method could not choose: the answer is the first completion."""
    said: Sequence[str] = ()
    """What it has to say for people, in a few words each; where there is nothing, they are shown `fields`."""

    @property
    def timings(self) -> "Timings":
        """Of all jobs."""
        return reduce(add, [handle.timings for handle in self.jobs])

    @property
    def generated_tokens(self) -> int:
        """Of all jobs' answers, end tokens not counted."""
        return sum(len(c.tokens) for handle in self.jobs for c in handle.completions)

    @property
    def completion(self) -> "Completion":
        """The answer."""
        return self.completions[self.index]


Answering = Generator["Sequence[Job]", "Sequence[Handle]", Outcome]
"""Yields jobs, is sent them once all are finished, and returns the outcome. What one of them failed with is
raised where it was yielded; a method that does not catch it fails with it."""


@dataclass(frozen=True)
class Method:
    """Base of all methods, and the one without a name: the sampling settings as they are, one answer.

    A method either sets how samples are drawn, or `collects`: says what is done with them. One of each can
    be chosen together. Raises UsageError for settings that contradict each other.
    """

    name: ClassVar[str] = ""
    collects: ClassVar[bool] = False
    votes: ClassVar[bool] = False
    """It compares the answers in several texts, so they must have some: programs do not."""
    runs_code: ClassVar[bool] = False
    """It runs programs in the answers, so that these must be programs."""
    sampling: ClassVar[Mapping[str, float]] = {}
    """Sampling settings, where nobody has chosen others."""
    fixed: ClassVar[frozenset[str]] = frozenset()
    """Those of them that nobody may choose otherwise."""
    step: ClassVar[type[EMStep] | None] = None
    """The EM step that it samples with."""
    value: ClassVar[str] = ""
    """What NAME:VALUE sets: a setting of its own or of a batch line."""
    with_value: ClassVar[Mapping[str, float]] = {}
    """What NAME:VALUE sets besides."""

    def params(self, given: SamplingParams, chosen: frozenset[str] = frozenset()) -> SamplingParams:
        """The sampling settings of this method.

        Args:
            given: what flags, config file and model say.
            chosen: the settings that were given on purpose, which a method does not override.
        Raises:
            UsageError: the settings say what the method denies.
        """
        if not self.name:
            return given
        for name in sorted(self.fixed & chosen):
            if vars(given)[name] != self.sampling[name]:
                flag = records_of(SamplingParams)[name].flag
                raise UsageError(f"--method {self.name} and {flag} contradict each other")
        own: dict[str, Any] = {name: v for name, v in self.sampling.items() if name not in chosen}
        if self.collects:
            return replace(given, **own) if own else given
        em = given.em
        if self.step is not None and em is None and not chosen & _SWITCHES:
            em = self.step()
        if type(em) is not (self.step or type(None)):
            raise UsageError(f"--method {self.name} and the EM flags contradict each other")
        return replace(given, em=em, **own)

    def samples(self, asked: int | None) -> int:
        """How many are drawn for each prompt; `asked`: by a person. Raises UsageError."""
        return asked or 1

    def answer(self, question: "Question") -> Answering:
        """Answer a question."""
        [done] = yield [question.job()]
        return Outcome([done], done.completions)

    def describe(self, samples: int) -> list[str]:
        """What is done with the samples, in words; nothing where one is the answer."""
        return []

    def check(self, params: SamplingParams) -> None:
        """Raise UsageError for sampling settings with which it can do nothing."""

    def check_leave(self) -> None:
        """Raise where it may not do what it does here: UsageError without the user's leave, EmlocalError
        where programs cannot be contained."""
