"""The base of all methods. A method is one file here with its settings; `emlocal.methods` lists them all.

    @dataclass(frozen=True)
    class Twice(Method):
        name: ClassVar[str] = "twice"
        collects: ClassVar[bool] = True

        def answer(self, question: Question) -> Answering:
            [first] = yield [question.job()]
            [second] = yield [question.job(round=1)]
            return Outcome([first, second], second.completions)

A method's settings are fields made by `setting(...)`. Flags, Python keywords and eval's specs follow from
them. This module imports no numpy, because `emlocal --help` must be quick.
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
    """The result of a method."""

    jobs: "Sequence[Handle]"
    """All finished jobs, in the order in which they were yielded."""
    completions: "Sequence[Completion]"
    """The completions among which the answer was chosen, by sample; at least one."""
    index: int = 0
    """Index of the answer among them."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The method's own fields for output rows, as JSON values."""
    drafts: Sequence[str] = ()
    """The successive revisions, the answer last; empty without revisions."""
    confidence: float | None = None
    """The method's confidence that the answer is right, from 0 to 1, before any calibration.

    It is None if the method knows no more than the answer's scores.
    """
    undecided: bool = False
    """Whether the method could not choose, so that the answer is the first completion."""
    said: Sequence[str] = ()
    """Remarks for people, a few words each; if empty, people see `fields`."""

    @property
    def timings(self) -> "Timings":
        """Timings of all jobs together."""
        return reduce(add, [handle.timings for handle in self.jobs])

    @property
    def generated_tokens(self) -> int:
        """Tokens of all jobs' answers, without end tokens."""
        return sum(len(c.tokens) for handle in self.jobs for c in handle.completions)

    @property
    def completion(self) -> "Completion":
        """The answer."""
        return self.completions[self.index]


Answering = Generator["Sequence[Job]", "Sequence[Handle]", Outcome]
"""Yields jobs, receives their handles once all are finished, and returns the outcome.

A job's error is raised at the yield; a method that does not catch it fails with it.
"""


@dataclass(frozen=True)
class Method:
    """Base of all methods. By itself it is the nameless method: unchanged sampling settings, one answer.

    A method either sets how samples are drawn, or it `collects`: it decides what to do with them. One of each
    kind can be combined. Raises UsageError for settings that contradict each other.
    """

    name: ClassVar[str] = ""
    collects: ClassVar[bool] = False
    votes: ClassVar[bool] = False
    """Whether it compares the answers within texts. Programs contain no such answers."""
    runs_code: ClassVar[bool] = False
    """Whether it runs programs in the answers, which must then be programs."""
    sampling: ClassVar[Mapping[str, float]] = {}
    """Sampling settings that apply unless others were chosen explicitly."""
    fixed: ClassVar[frozenset[str]] = frozenset()
    """Names of those settings that must not be changed."""
    step: ClassVar[type[EMStep] | None] = None
    """The EM step that it samples with."""
    value: ClassVar[str] = ""
    """The setting that NAME:VALUE sets: the method's own, or one of a batch line."""
    with_value: ClassVar[Mapping[str, float]] = {}
    """Other settings that NAME:VALUE sets too."""

    def params(self, given: SamplingParams, chosen: frozenset[str] = frozenset()) -> SamplingParams:
        """Returns the sampling settings of this method.

        Args:
            given: the settings from flags, config file and model.
            chosen: explicitly chosen settings, which a method does not override.
        Raises:
            UsageError: the settings contradict the method.
        """
        if not self.name:
            return given
        for name in sorted(self.fixed & chosen):
            if vars(given)[name] != self.sampling[name]:
                flag = records_of(SamplingParams)[name].flag
                raise UsageError(
                    f"--method {self.name} and {flag} contradict each other", "leave one of them out"
                )
        own: dict[str, Any] = {name: v for name, v in self.sampling.items() if name not in chosen}
        if self.collects:
            return replace(given, **own) if own else given
        em = given.em
        if self.step is not None and em is None and not chosen & _SWITCHES:
            em = self.step()
        if type(em) is not (self.step or type(None)):
            raise UsageError(
                f"--method {self.name} and the EM flags contradict each other", "leave one of them out"
            )
        return replace(given, em=em, **own)

    def samples(self, asked: int | None) -> int:
        """Returns the number of samples for each prompt; `asked`: the user's number. Raises UsageError."""
        return asked or 1

    def answer(self, question: "Question") -> Answering:
        """Answers a question."""
        [done] = yield [question.job()]
        return Outcome([done], done.completions)

    def describe(self, samples: int) -> list[str]:
        """Describes the use of the samples in words; empty if a single one is the answer."""
        return []

    def check(self, params: SamplingParams) -> None:
        """Raises UsageError for sampling settings with which the method cannot work."""

    def check_leave(self) -> None:
        """Raises an error if the method may not run code here.

        UsageError: the user did not allow it. EmlocalError: this machine cannot contain programs.
        """
