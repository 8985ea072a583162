"""Ways to answer: EM and what it is compared with. A method is one file here and one line in `_ALL`
(docs/extending.md).

People write a method as NAME[:VALUE][:SETTING=VALUE…]: `em-inf:paper`, `sample:1`, `self-consistency:4`; and
two with + between, where one says how samples are drawn and the other what is done with them:
em-inf+self-consistency:4. Settings are those that a line of a batch may set (docs/batch.md).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from emlocal.errors import UsageError
from emlocal.methods.behaviour_vote import BehaviourVote
from emlocal.methods.dynamic_temperature import DynamicTemperature
from emlocal.methods.em import EM_METHODS
from emlocal.methods.em_best import EMBest
from emlocal.methods.greedy import Greedy
from emlocal.methods.method import Answering, Method, Outcome
from emlocal.methods.min_p import MinP
from emlocal.methods.power import Power
from emlocal.methods.sample import Sample
from emlocal.methods.self_consistency import SelfConsistency
from emlocal.methods.sequential_refinement import SequentialRefinement
from emlocal.methods.think_em import ThinkEM
from emlocal.methods.vote import Vote
from emlocal.settings import (
    EM_PRESETS,
    Given,
    Plan,
    SamplingParams,
    Setting,
    Table,
    overridden,
    records_of,
    setting,
)
from emlocal.settings.em import PRESET
from emlocal.settings.resolve import LINE, names_in
from emlocal.settings.table import FLAGS
from emlocal.text import parse_json

__all__ = ["HOW", "METHODS", "Answering", "Chosen", "Method", "Outcome", "chosen_by", "name_of", "with_leave"]

_ALL: Sequence[type[Method]] = (
    Sample,
    Greedy,
    *EM_METHODS,
    SelfConsistency,
    Vote,
    EMBest,
    SequentialRefinement,
    ThinkEM,
    Power,
    BehaviourVote,
    MinP,
    DynamicTemperature,
)
METHODS: Mapping[str, type[Method]] = {method.name: method for method in _ALL}
_EXAMPLES = "such as greedy, sample:1, em-inf:paper, self-consistency:4 or em-inf+self-consistency:4"
_COMMON: Mapping[str, str] = {
    "seed": "all methods share their draws; --seed says which",
    "samples": "self-consistency:N says how many vote, and --samples how many answers each question gets",
}
"""What cannot be one method's own."""


@dataclass(frozen=True)
class _Choice:
    """What is chosen with any method."""

    method: str | None = setting(
        None,
        "--method",
        help=f"How to answer: {', '.join(METHODS)}; without it, as the sampling and EM flags say. NAME:VALUE"
        " and A+B as in eval.",
        metavar="METHOD",
    )
    samples: int | None = setting(
        None,
        "-n --samples --n --num-return-sequences",
        1,
        1024,
        "Answers to each prompt. (default: 1; 8 to vote)",
    )


HOW = Table.of(_Choice, *_ALL)
"""What chooses a method: its name, how many samples, and the methods' own settings."""
_SAMPLES = HOW.settings["samples"]
_OWN = HOW.without("method")


class Chosen:
    """A method with its settings, as people choose it; `emlocal.Method` in Python.

    A way to draw samples, and what is done with them; each may be left as it is.
    """

    def __init__(self, name: str | None = None, samples: int | None = None, **settings: Any) -> None:
        """Choose a method.

        Args:
            name: as above; None: one answer, with the sampling settings as they are.
            samples: answers to each prompt; None: as many as the method needs.
            settings: the method's own, such as `rounds=3`.
        Raises:
            UsageError: the method does not exist, or does not have these settings.
        """
        self.written = name
        self.settings: dict[str, Any] = {}
        """What the name sets of a line's settings."""
        own: dict[str, Any] = {}
        kinds: dict[bool, type[Method]] = {}
        for part in (name or "").split("+") if name else ():
            word, *arguments = part.split(":")
            kind = METHODS.get(word)
            if kind is None:
                raise UsageError(
                    f"there is no method {part!r}; a method is one of {', '.join(METHODS)}", _EXAMPLES
                )
            if kind.collects in kinds:
                other = kinds[kind.collects].name
                raise UsageError(f"the methods in {name!r} exclude each other: {other} and {word}")
            kinds[kind.collects] = kind
            for known, value, is_own in _arguments(part, kind, arguments):
                (own if is_own else self.settings)[known] = value
        given = {**own, **_OWN.read({"samples": samples, **settings}, FLAGS)}
        self._asked: int | None = given.pop(_SAMPLES.name, None)
        self.drawing, self.collecting = (_made(kinds.get(kind), given) for kind in (False, True))
        for left in given:
            owners = [method.name for method in _ALL if left in Table.of(method).settings]
            raise UsageError(f"{_OWN.settings[left].flag} belongs to --method {' or '.join(owners)}")
        self.samples = self.collecting.samples(self._asked)
        """How many are drawn for each prompt."""

    @property
    def streams(self) -> bool:
        """Whether the answer is what is drawn, as it is drawn."""
        return self.samples == 1 and not self.collecting.collects

    @property
    def name(self) -> str | None:
        """The method's, of two that of what is done with the samples; None where none was chosen."""
        return self.collecting.name or self.drawing.name or None

    def plan(self, base: Plan, chosen: frozenset[str] = frozenset()) -> Plan:
        """The settings of an answer as this method has them.

        Args:
            base: what flags, config file and model say.
            chosen: the settings that were given on purpose, which a method does not override.
        Raises:
            UsageError: the settings say what the method denies; it has no leave to do what it does.
            EmlocalError: it cannot do it on this machine.
        """
        self.collecting.check_leave()
        plan = replace(base, params=self._sampler.params(base.params, chosen), samples=self.samples)
        return overridden(plan, self.settings)

    def params(self, given: SamplingParams, chosen: frozenset[str] = frozenset()) -> SamplingParams:
        """The sampling settings of a line whose own are in `given` already; otherwise like `plan`."""
        return self._sampler.params(given, chosen | names_in(self.settings))

    @property
    def _sampler(self) -> Method:
        """Which of the two says how tokens are drawn, where nobody has chosen otherwise."""
        return self.drawing if self.drawing.name else self.collecting

    def identity(self) -> dict[str, Any]:
        """What makes answers by two of them different, beside the settings of the plan."""
        identity: dict[str, Any] = {
            "method": self.name,
            "rounds": 0,
            "extract": None,
            "extract-pattern": None,
        }
        for method in (self.drawing, self.collecting):
            for field, known in records_of(type(method)).items():
                identity[known.flag.removeprefix("--")] = vars(method)[field]
        return identity

    def collected(self) -> "Chosen":
        """The same samples' use, drawn with the sampling settings as they are."""
        other = Chosen()
        other.collecting, other.samples = self.collecting, self.samples
        if self.collecting.name:  # which would say again how tokens are drawn
            other.drawing = _Settled()
        return other


@dataclass(frozen=True)
class _Settled(Method):
    """The sampling settings as they are: who was to say something about them has."""

    name = "settled"

    def params(self, given: SamplingParams, chosen: frozenset[str] = frozenset()) -> SamplingParams:
        return given


def chosen_by(how: Given) -> Chosen:
    """The method that flags choose; see `HOW`."""
    own = {known: value for known, value in how.items() if known not in ("method", _SAMPLES.name)}
    return Chosen(how.get("method"), how.get(_SAMPLES.name), **own)


def with_leave(name: str | None, allow_code: bool) -> Chosen:
    """The method of this name, which has leave to run code where it does and `allow_code` says so."""
    chosen = Chosen(name)
    return Chosen(name, allow_code=True) if allow_code and chosen.collecting.runs_code else chosen


def name_of(params: SamplingParams) -> str:
    """The method that these settings are."""
    if params.em is not None:
        return params.em.name
    return Greedy.name if params.temperature == 0 else Sample.name


def _made(kind: type[Method] | None, given: dict[str, Any]) -> Method:
    """The method with those of the settings that are its own, which are taken out of `given`."""
    known = Table.of(kind or Method).settings
    own = {known[name].field: given.pop(name) for name in [*given] if name in known}
    return (kind or Method)(**own)


def _arguments(part: str, kind: type[Method], texts: Sequence[str]) -> Iterator[tuple[str, Any, bool]]:
    """(setting, value, whether it is the method's own) of what follows a method's name."""
    names: set[str] = set()
    table = Table.of(kind) | (Table({_SAMPLES.name: _SAMPLES}) if kind.collects else Table({}))
    for position, argument in enumerate(texts):
        name, equals, text = argument.partition("=")
        if not equals:
            if kind.collects and (position or not argument.isdecimal()):
                raise UsageError(f"in {part!r}, after {kind.name}: comes one number", _EXAMPLES)
            if position or not kind.value:
                raise UsageError(f"in {part!r}, {argument!r} says nothing there", _EXAMPLES)
            if kind.value == PRESET.name and argument not in EM_PRESETS:
                raise UsageError(f"in {part!r}, the presets are {', '.join(EM_PRESETS)}")
            name, text = kind.value, argument
            yield from ((other, value, False) for other, value in kind.with_value.items())
        known, own = table.find(name), True
        if known is None or (equals and known is _SAMPLES):
            known, own = _of_a_line(part, name), False
        if known.name in names:
            raise UsageError(f"{part!r} sets {known.name} twice")
        names.add(known.name)
        yield known.name, _value(text), own


def _of_a_line(part: str, name: str) -> Setting:
    known = LINE.find(name)
    if known is None:
        near = LINE.meant(name)
        hint = f"did you mean {near.name}?" if near else "docs/batch.md lists them"
        raise UsageError(f"in {part!r}, there is no setting {name!r}", hint)
    if known.name in _COMMON:
        raise UsageError(f"in {part!r}, {_COMMON[known.name]}")
    return known


def _value(text: str) -> Any:
    """A number or true or false, as JSON has them; else the text."""
    try:
        return parse_json(text)
    except ValueError:
        return text
