"""What is compared: methods as people write them, `em-inf:paper`, `self-consistency:4`, `sample:1`.

A contender is NAME[:VALUE][:SETTING=VALUE…], and two of them with + between where one says how samples are
drawn and the other what is done with them: em-inf+self-consistency:4. Settings are those that a line of a
batch may set (docs/batch.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from emlocal.errors import UsageError
from emlocal.formatting import counted
from emlocal.methods.method import METHODS, Method, MethodName
from emlocal.settings import EM_PRESETS, Plan, describe_em, overridden
from emlocal.settings.resolve import LINE
from emlocal.text import parse_json

_PLAIN = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "dynatemp_range": 0.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Nothing between the model's distribution and the draw but the temperature."""
_COLLECTING = ("self-consistency", "sequential-refinement")
_VALUES: Mapping[str, str] = {  # what NAME:VALUE sets
    "sample": "temperature",
    "min-p": "min_p",
    "em-inf": "em_preset",
    "adaptive-temperature": "em_ratio",
    "dynamic-temperature": "dynatemp_range",
}
_COMMON: Mapping[str, str] = {
    "seed": "all methods share their draws; --seed says which",
    "samples": "self-consistency:N says how many vote, and --samples how many answers each question gets",
}
"""What cannot be one method's own."""
_EXAMPLES = "such as greedy, sample:1, em-inf:paper, self-consistency:4 or em-inf+self-consistency:4"


@dataclass(frozen=True)
class Contender:
    """One method with its settings."""

    name: str
    """As it was written."""
    drawing: Method
    """How samples are drawn, and …"""
    collecting: Method
    """… what is done with them: one is the answer, or they vote, or it is revised."""
    settings: Mapping[str, Any]

    def plan(self, base: Plan, chosen: frozenset[str]) -> Plan:
        """The base's settings as this method has them. `chosen`: fields that were set on purpose.

        Raises UsageError where the settings cannot be meant.
        """
        # --temp is for those that sample; greedy stands beside them
        kept = chosen - {"temperature"} if self.drawing.name == "greedy" else chosen
        plan = replace(
            base,
            params=self.drawing.params(base.params, kept),
            samples=self.collecting.samples_per_prompt,
        )
        plan = overridden(plan, self.settings)
        if plan.params.temperature == 0 and self.collecting.name == "self-consistency":
            raise UsageError(f"{self.name}: greedy samples are all alike, and cannot vote")
        return plan


def read_contenders(text: str) -> list[Contender]:
    """The contenders of a comma-separated list. Raises UsageError for one that is unknown, or given twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods names none", f"name some, {_EXAMPLES}")
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--methods has {name} twice")
    return [_contender(name) for name in names]


def _contender(name: str) -> Contender:
    drawing, collecting = Method(), Method()
    settings: dict[str, Any] = {}
    for part in name.split("+"):
        word, *arguments = part.split(":")
        if word not in METHODS:
            raise UsageError(f"--methods has {part!r}; a method is one of {', '.join(METHODS)}", _EXAMPLES)
        if word in _COLLECTING:
            if collecting.name is not None:
                raise UsageError(f"--methods has {name!r}: {collecting.name} and {word} exclude each other")
            collecting = _collecting(name, word, arguments)
        else:
            if drawing.name is not None:
                raise UsageError(f"--methods has {name!r}: {drawing.name} and {word} exclude each other")
            drawing = Method(word)
            settings |= _settings(part, word, arguments)
    return Contender(name, drawing, collecting, settings)


def _collecting(name: str, word: MethodName, arguments: Sequence[str]) -> Method:
    count: int | None = None
    if arguments:
        if len(arguments) > 1 or not arguments[0].isdecimal():
            raise UsageError(f"--methods has {name!r}; after {word}: comes one number", _EXAMPLES)
        count = int(arguments[0])
    return Method(word, samples=count) if word == "self-consistency" else Method(word, rounds=count)


def _settings(part: str, word: str, arguments: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for position, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        if not equals:
            if position or word not in _VALUES:
                raise UsageError(f"--methods has {part!r}: {argument!r} says nothing there", _EXAMPLES)
            name, text = _VALUES[word], argument
            found |= _PLAIN if word == "sample" else {}
            if word == "em-inf" and text not in EM_PRESETS:
                raise UsageError(f"--methods has {part!r}; the presets are {', '.join(EM_PRESETS)}")
        known = LINE.find(name)
        if known is None:
            near = LINE.meant(name)
            hint = f"did you mean {near.name}?" if near else "docs/batch.md lists them"
            raise UsageError(f"--methods has {part!r}: there is no setting {name!r}", hint)
        if known.name in _COMMON:
            raise UsageError(f"--methods has {part!r}: {_COMMON[known.name]}")
        if known.name in found:
            raise UsageError(f"--methods has {part!r}: it sets {known.name} twice")
        found[known.name] = _value(text)
    return found


def _value(text: str) -> Any:
    """A number or true or false, as JSON has them; else the text."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def describe(contender: Contender, plan: Plan, base: Plan) -> str:
    """The settings in words: "T 0.8, min-p 0.05, EM-INF δ 0.3 …; the majority of 4".

    What `base` has too is left out where it is no setting of the draw: limits and stops.
    """
    params = plan.params
    words = ["the most probable token"] if params.temperature == 0 else [f"T {params.temperature:g}"]
    if params.temperature != 0:
        for label, value, off in (
            ("top-k", params.top_k, 0),
            ("top-p", params.top_p, 1),
            ("min-p", params.min_p, 0),
            ("± range", params.dynatemp_range, 0),
        ):
            words += [f"{label} {value:g}"] if value != off else []
    if params.penalizes:
        words.append(f"repeat penalty {params.repeat_penalty:g}")
    if params.em is not None:
        words.append(f"EM {describe_em(params.em)}")
    if contender.collecting.name == "self-consistency":
        words.append(f"majority of {plan.samples}")
    if contender.collecting.revisions:
        words.append(counted(contender.collecting.revisions, "revision"))
    if plan.max_tokens != base.max_tokens:
        words.append(f"at most {counted(plan.max_tokens, 'token')}")
    if plan.stop != base.stop:
        words.append(f"stops {list(plan.stop)}")
    return ", ".join(words)
