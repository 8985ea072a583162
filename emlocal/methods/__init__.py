"""Methods of answering: EM and the methods that it is compared with.

Each method is one file here and one line in `_ALL` (docs/extending.md).

People write a method as NAME[:VALUE][:SETTING=VALUE…]: `em-inf:paper`, `sample:1`, `self-consistency:4`. They
can join two by +, if one sets how samples are drawn and the other what is done with them:
em-inf+self-consistency:4. The settings are those that a line of a batch may set (docs/batch.md).
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
_EXAMPLES = "use greedy, sample:1, em-inf:paper, self-consistency:4 or em-inf+self-consistency:4, for example"
_COMMON: Mapping[str, str] = {
    "seed": "all methods share their draws, which --seed sets",
    "samples": "self-consistency:N sets the votes, --samples the answers to each question",
}
"""Settings that no method can set for itself, with the reason."""


@dataclass(frozen=True)
class _Choice:
    """Settings that apply to any method."""

    method: str | None = setting(
        None,
        "--method",
        help=f"Choose how to answer: {', '.join(METHODS)}; without it, as the sampling and EM flags"
        " say. NAME:VALUE"
        " and A+B as in eval.",
        metavar="METHOD",
    )
    samples: int | None = setting(
        None,
        "-n --samples --n --num-return-sequences",
        1,
        1024,
        "Set the number of answers to each prompt. (default: 1; 8 to vote)",
    )


HOW = Table.of(_Choice, *_ALL)
"""The settings that choose a method: its name, the number of samples, and the methods' own settings."""
_SAMPLES = HOW.settings["samples"]
_OWN = HOW.without("method")


class Chosen:
    """A method with its settings, as people choose it; `emlocal.Method` in Python.

    It has two parts: how samples are drawn, and what is done with them. Each may be the default.
    """

    def __init__(self, name: str | None = None, samples: int | None = None, **settings: Any) -> None:
        """Chooses a method.

        Args:
            name: as above; None: one answer, with the sampling settings as they are.
            samples: answers to each prompt; None: as many as the method needs.
            settings: the method's own, such as `rounds=3`.
        Raises:
            UsageError: the method does not exist, or does not have these settings.
        """
        self.written = name
        self.settings: dict[str, Any] = {}
        """Settings of a line that the name sets."""
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
        """Number of samples for each prompt."""

    @property
    def streams(self) -> bool:
        """Whether the answer can be shown as it is drawn."""
        return self.samples == 1 and not self.collecting.collects

    @property
    def name(self) -> str | None:
        """The method's name; of two, that of the collecting one; None if none was chosen."""
        return self.collecting.name or self.drawing.name or None

    def plan(self, base: Plan, chosen: frozenset[str] = frozenset()) -> Plan:
        """Returns the settings of an answer by this method.

        Args:
            base: the settings from flags, config file and model.
            chosen: explicitly chosen settings, which a method does not override.
        Raises:
            UsageError: the settings contradict the method, or it may not run code.
            EmlocalError: the method cannot run on this machine.
        """
        self.collecting.check_leave()
        plan = replace(base, params=self._sampler.params(base.params, chosen), samples=self.samples)
        return overridden(plan, self.settings)

    def params(self, given: SamplingParams, chosen: frozenset[str] = frozenset()) -> SamplingParams:
        """Like `plan`, for the sampling settings of a line whose own are already in `given`."""
        return self._sampler.params(given, chosen | names_in(self.settings))

    @property
    def _sampler(self) -> Method:
        """The one of the two that sets the sampling settings which nobody chose explicitly."""
        return self.drawing if self.drawing.name else self.collecting

    def identity(self) -> dict[str, Any]:
        """Returns what makes answers by two methods differ, beside the settings of the plan."""
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
        """Returns a method with the same use of samples that leaves the sampling settings unchanged."""
        other = Chosen()
        other.collecting, other.samples = self.collecting, self.samples
        if self.collecting.name:  # which would set the sampling settings again
            other.drawing = _Settled()
        return other


@dataclass(frozen=True)
class _Settled(Method):
    """Leaves the sampling settings unchanged, because a method already set them."""

    name = "settled"

    def params(self, given: SamplingParams, chosen: frozenset[str] = frozenset()) -> SamplingParams:
        return given


def chosen_by(how: Given) -> Chosen:
    """Returns the method that flags choose; see `HOW`."""
    own = {known: value for known, value in how.items() if known not in ("method", _SAMPLES.name)}
    return Chosen(how.get("method"), how.get(_SAMPLES.name), **own)


def with_leave(name: str | None, allow_code: bool) -> Chosen:
    """Returns the method of this name.

    It may run code if `allow_code` says so and the method does run code.
    """
    chosen = Chosen(name)
    return Chosen(name, allow_code=True) if allow_code and chosen.collecting.runs_code else chosen


def name_of(params: SamplingParams) -> str:
    """Returns the name of the method that these settings amount to."""
    if params.em is not None:
        return params.em.name
    return Greedy.name if params.temperature == 0 else Sample.name


def _made(kind: type[Method] | None, given: dict[str, Any]) -> Method:
    """Makes a method with its own settings, which are removed from `given`."""
    known = Table.of(kind or Method).settings
    own = {known[name].field: given.pop(name) for name in [*given] if name in known}
    return (kind or Method)(**own)


def _arguments(part: str, kind: type[Method], texts: Sequence[str]) -> Iterator[tuple[str, Any, bool]]:
    """Yields (setting, value, whether it is the method's own) for the arguments after a method's name."""
    names: set[str] = set()
    table = Table.of(kind) | (Table({_SAMPLES.name: _SAMPLES}) if kind.collects else Table({}))
    for position, argument in enumerate(texts):
        name, equals, text = argument.partition("=")
        if not equals:
            if kind.collects and (position or not argument.isdecimal()):
                raise UsageError(f"in {part!r}, after {kind.name}: one number is expected", _EXAMPLES)
            if position or not kind.value:
                raise UsageError(f"in {part!r}, {argument!r} is not a setting", _EXAMPLES)
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
        hint = f"did you mean {near.name}?" if near else "docs/batch.md lists the settings"
        raise UsageError(f"in {part!r}, there is no setting {name!r}", hint)
    if known.name in _COMMON:
        raise UsageError(f"in {part!r}, {_COMMON[known.name]}")
    return known


def _value(text: str) -> Any:
    """Parses a number, true or false as JSON; any other text stays text."""
    try:
        return parse_json(text)
    except ValueError:
        return text
