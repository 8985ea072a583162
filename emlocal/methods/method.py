"""Ways to answer a prompt, for `emlocal batch` and `emlocal eval`: EM and what it is compared with.

A method sets the sampling, says how many samples it needs, may ask again (refinement), and picks the answer.
What it costs is counted for each: forward passes, tokens, seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from emlocal.errors import UsageError
from emlocal.methods.answers import Extraction, check_pattern, equivalent, extract, find_answer, majority
from emlocal.models.templates import Message
from emlocal.settings import AdaptiveTemperature, EMInf, SamplingParams

MethodName = Literal[
    "sample",
    "greedy",
    "em-inf",
    "adaptive-temperature",
    "self-consistency",
    "sequential-refinement",
    "min-p",
    "dynamic-temperature",
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)

REVISE = (
    "Check your answer above step by step. If you find a mistake, correct it. Then give the complete, final"
    " answer in the same form."
)
"""What sequential refinement says. The authors' code says nothing: it repeats the prompt."""
_SETTINGS: Mapping[MethodName, Mapping[str, float]] = {
    "greedy": {"temperature": 0.0},
    "min-p": {"min_p": 0.1, "temperature": 1.0},  # the settings of its paper, arXiv 2407.01082
    "dynamic-temperature": {"dynatemp_range": 0.5},
}
_EM_SWITCHES = frozenset({"em_inf", "adaptive_temp"})  # of a line, in `chosen`
_SAMPLES = 8  # of self-consistency, where nobody says how many
_ROUNDS = 2  # of refinement


@dataclass(frozen=True)
class Method:
    """A way to answer. Raises UsageError for settings that contradict each other."""

    name: MethodName | None = None
    """None: the sampling settings as they are."""
    samples: int | None = None
    """None: 1; 8 with self-consistency."""
    rounds: int | None = None
    """Revisions of sequential refinement; None: 2."""
    extraction: Extraction | None = None
    """How self-consistency finds the answer that samples vote with; None: "boxed", or the last number."""
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and self.name not in METHODS:
            raise UsageError(f"--method is {self.name!r}; it must be one of {', '.join(METHODS)}")
        if self.samples is not None and not 1 <= self.samples <= 1024:
            raise UsageError(f"--samples is {self.samples}; it must be between 1 and 1024")
        if self.rounds is not None and self.name != "sequential-refinement":
            raise UsageError("--rounds belongs to --method sequential-refinement")
        if self.rounds is not None and not 1 <= self.rounds <= 100:
            raise UsageError(f"--rounds is {self.rounds}; it must be between 1 and 100")
        if self.name == "sequential-refinement" and (self.samples or 1) > 1:
            raise UsageError("--samples and --method sequential-refinement contradict each other")
        if (self.extraction or self.pattern) and self.name != "self-consistency":
            raise UsageError("--extract belongs to --method self-consistency")
        if self.name == "self-consistency" and self.samples == 1:
            raise UsageError("--samples is 1; self-consistency needs at least 2 to vote")
        check_pattern(self.extraction or "none", self.pattern)

    @property
    def samples_per_prompt(self) -> int:
        """How many are drawn."""
        return self.samples or (_SAMPLES if self.name == "self-consistency" else 1)

    @property
    def revisions(self) -> int:
        """How often it asks again."""
        return (self.rounds or _ROUNDS) if self.name == "sequential-refinement" else 0

    def params(self, given: SamplingParams, chosen: frozenset[str] = frozenset()) -> SamplingParams:
        """The sampling settings of this method.

        Args:
            given: what flags, config file and model say.
            chosen: the fields of `given` that were set on purpose, which a method does not override.
        Raises:
            UsageError: the settings say what the method denies.
        """
        values = dict(_SETTINGS.get(self.name, {})) if self.name else {}
        em = given.em
        if self.name == "em-inf":
            em = em or EMInf()
        elif self.name == "adaptive-temperature":
            em = em or AdaptiveTemperature()
        if self.name == "greedy" and "temperature" in chosen and given.temperature != 0:
            raise UsageError("--method greedy and --temp contradict each other")
        wrong_step = (self.name == "em-inf" and not isinstance(em, EMInf)) or (
            self.name == "adaptive-temperature" and not isinstance(em, AdaptiveTemperature)
        )
        if self.name in ("em-inf", "adaptive-temperature") and given.em is None and chosen & _EM_SWITCHES:
            wrong_step = True  # switched off on purpose
        without = self.name in ("sample", "greedy", "min-p", "dynamic-temperature")
        if wrong_step or (without and em is not None):
            raise UsageError(f"--method {self.name} and the EM flags contradict each other")
        known = {f.name for f in fields(SamplingParams)}
        assert values.keys() <= known
        return replace(given, em=em, **{n: v for n, v in values.items() if n not in chosen})  # type: ignore[arg-type]

    def pick(self, texts: Sequence[str]) -> "Vote | None":
        """What the samples agree on; None where the method does not vote."""
        if self.name != "self-consistency":
            return None
        answers = [self._answer(text) for text in texts]
        winner = majority(answers)
        if winner is None:
            return Vote(None, None, 0)
        answer = answers[winner]
        return Vote(winner, answer, sum(equivalent(a, answer) for a in answers if a and answer))

    def _answer(self, text: str) -> str | None:
        if self.extraction is not None:
            return extract(text, self.extraction, self.pattern)
        found = find_answer(text)
        return None if found is None else found[0]

    def follow_up(self, messages: Sequence[Message], answer: str) -> list[Message]:
        """The conversation in which the model is asked to revise its answer."""
        return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": REVISE}]


def name_of(params: SamplingParams) -> MethodName:
    """The method that these settings are."""
    if isinstance(params.em, EMInf):
        return "em-inf"
    if params.em is not None:
        return "adaptive-temperature"
    return "greedy" if params.temperature == 0 else "sample"


@dataclass(frozen=True)
class Vote:
    """What self-consistency decided."""

    index: int | None
    """The sample that stands for the winner; None if none gave an answer."""
    answer: str | None
    votes: int
