"""Definition of a setting. Each setting is declared once, in the dataclass that holds its value:

    @dataclass(frozen=True)
    class SamplingParams:
        top_k: int = setting(0, "--top-k", 0, 10**9, "Keep the k most probable tokens (0 = all).")

That record is the source of the command line's flags, the keys of config.toml and of training's files, and
`/set`. It also gives the fields of a batch line, eval's `NAME:SETTING=VALUE`, Python's keywords, and the
checks with their messages. The module does not import numpy: `emlocal --help` must be quick.
"""

import difflib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from emlocal.errors import UsageError

Kind = Literal["number", "whole", "switch", "choice", "text", "texts", "path"]
Given = Mapping[str, Any]
"""Settings that somebody gave: name → value, of the type in the setting's dataclass."""
NOTHING: Given = {}
Read = Callable[[Any, str], Any]
"""A function that turns a typed value, and the setting's name for messages, into the dataclass's value."""
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """One setting, as the program and its users need to know it."""

    flag: str
    """The name on the command line; without its dashes, the key in files and in `/set`."""
    low: float = -math.inf
    high: float = math.inf
    help: str = ""
    low_is_open: bool = False
    unit: str = ""
    name: str = ""
    """The name in batch lines and in Python."""
    field: str = ""
    """The name of the dataclass's field."""
    kind: Kind = "number"
    choices: tuple[str, ...] = ()
    default: Any = None
    aliases: tuple[str, ...] = ()
    """Further flags: other programs' names for it.

    They work wherever a name is typed, but are not in `--help`.
    """
    short: str = ""
    off: str = ""
    """The flag that sets it to false."""
    metavar: str | None = None
    panel: str | None = None
    """The part of `--help` that lists it."""
    read: Read | None = None

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return self.kind == "whole"

    def span(self) -> str:
        """Returns the range in words, such as "between 0 and 1" or "more than 0 and at most 1"."""
        if math.isinf(self.high):
            span = f"more than {_bound(self.low)}" if self.low_is_open else f"at least {_bound(self.low)}"
        elif self.low_is_open:
            span = f"more than {_bound(self.low)} and at most {_bound(self.high)}"
        else:
            span = f"between {_bound(self.low)} and {_bound(self.high)}"
        return f"{span} {self.unit}".rstrip()

    def described(self) -> str:
        """Returns the kind of value that it takes, in words."""
        if self.kind == "choice":
            return " or ".join(self.choices) if len(self.choices) < 3 else f"one of {', '.join(self.choices)}"
        return {
            "number": f"a number {self.span()}",
            "whole": f"a whole number {self.span()}",
            "switch": "true or false",
            "text": "a text",
            "texts": "a text or a list of texts that are not empty",
            "path": "a path",
        }[self.kind]

    @property
    def flags(self) -> tuple[str, ...]:
        """All spellings on the command line, the main one first."""
        return (self.flag, *self.aliases)

    @property
    def full_help(self) -> str:
        """The help text, with the default added unless the text gives it already."""
        if "(default: " in self.help or self.default is None or self.default is False or self.kind == "texts":
            return self.help
        number = self.kind in ("number", "whole")
        default = self.flag if self.default is True else f"{self.default:g}" if number else self.default
        return f"{self.help} (default: {default})"

    def value(self, given: Any, said: str) -> Any:
        """Returns `given` as the dataclass's value. Raises UsageError, which calls the setting `said`."""
        if self.read is not None:
            return self.read(given, said)
        if self.kind in ("number", "whole"):
            return self._number(given, said)
        if self.kind == "texts":
            texts = [given] if isinstance(given, str) else given
            if isinstance(texts, list | tuple) and all(isinstance(text, str) and text for text in texts):
                return tuple(texts)
        elif self.kind == "path":
            if isinstance(given, str | Path):
                return Path(given)
        elif self.kind == "switch":
            if isinstance(given, bool):
                return given
        elif isinstance(given, str) and (self.kind == "text" or given in self.choices):
            return given
        raise UsageError(f"{said} is {shown(given)}; it must be {self.described()}")

    def _number(self, given: Any, said: str) -> float:
        number = (
            isinstance(given, int | float) and not isinstance(given, bool) and given == given
        )  # a NaN is not a number here
        if not number or (self.whole and not isinstance(given, int)):
            raise UsageError(f"{said} is {shown(given)}; it must be {self.described()}")
        too_low = given <= self.low if self.low_is_open else given < self.low
        if too_low or given > self.high or abs(given) > sys.float_info.max:
            value = f"{given:g}" if isinstance(given, float) else shown(given)
            raise UsageError(f"{said} is {value}; it must be {self.span()}")
        return given if self.whole else float(given)


def setting(
    default: Any,
    names: str,
    low: float = -math.inf,
    high: float = math.inf,
    help: str = "",
    *,
    low_is_open: bool = False,
    unit: str = "",
    metavar: str | None = None,
    panel: str | None = None,
    name: str = "",
    read: Read | None = None,
) -> Any:
    """Returns a dataclass field with a default and a Setting. The field's type gives its kind and choices.

    Args:
        names: "-s --seed": the flag, a letter for it, and other programs' names after it;
            "--resume/--restart": the flag, and the one that sets it to false.
        low, high: range of a number, in `unit`.
        name: the name in batch lines and in Python; the field's by default.
        read: the function that reads a typed value, if the type does not determine it.
    """
    flag, *aliases = names.split()
    short = ""
    if not flag.startswith("--"):
        short, flag, *aliases = flag, *aliases
    flag, _, off = flag.partition("/")
    known = Setting(
        flag,
        low,
        high,
        help,
        low_is_open,
        unit,
        name,
        default=default,
        aliases=tuple(aliases),
        short=short,
        off=off,
        metavar=metavar,
        panel=panel,
        read=read,
    )
    return field(default=default, metadata={"setting": known})


_RECORDS: dict[type, dict[str, Setting]] = {}  # of each settings dataclass; looked up for each line
_LEAST_MISSPELT = 8  # characters
_METAVARS: dict[Kind, str] = {"number": "X", "whole": "N", "text": "TEXT", "texts": "TEXT", "path": "FILE"}
_KINDS: dict[Any, Kind] = {float: "number", int: "whole", bool: "switch", str: "text", Path: "path"}


def records_of(cls: type) -> Mapping[str, Setting]:
    """Returns all settings of a dataclass, by field."""
    if cls not in _RECORDS:
        _RECORDS[cls] = {f.name: _record(f) for f in fields(cls) if "setting" in f.metadata}
    return _RECORDS[cls]


def _record(f: Field[Any]) -> Setting:
    known: Setting = f.metadata["setting"]
    (kind,) = (each for each in _alternatives(f.type) if each is not type(None))
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    found: Kind = "choice" if choices else "texts" if get_origin(kind) is tuple else _KINDS[kind]
    return replace(
        known,
        name=known.name or f.name,
        field=f.name,
        kind=found,
        choices=choices,
        metavar=known.metavar or _METAVARS.get(found),
    )


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Returns the types that a value may have: both for `int | None`."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def settings_of(cls: Any) -> dict[str, Setting]:
    """Returns the settings of a dataclass that are numbers, by field."""
    return {name: known for name, known in records_of(cls).items() if known.kind in ("number", "whole")}


def check_settings(values: Any) -> None:
    """Raises UsageError for the first value of a settings dataclass that is out of range or not a choice."""
    for name, known in records_of(type(values)).items():
        value = vars(values)[name]
        if known.kind in ("number", "whole", "choice") and not (value is None and known.default is None):
            known.value(value, known.flag)


def shown(value: Any) -> str:
    """Returns a value for an error message: as JSON, and at most 60 characters long."""
    import json  # imported here, because most runs have no error

    if isinstance(value, float) and not math.isfinite(value):
        return f"{value:g}"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _bound(value: float) -> str:
    """Returns a bound in words: 0.5, 1000, 2^64 - 1."""
    if isinstance(value, int) and value > 2**53 and (value + 1).bit_count() == 1:
        return f"2^{value.bit_length()} - 1"
    return f"{value:g}"


class Words:
    """The spelling of settings in one place where people type them."""

    def __init__(self, style: Literal["flag", "key", "name"], fix: str) -> None:
        """Sets the spelling. `fix`: how to switch a setting on."""
        self.style = style
        self.fix = fix

    def said(self, known: Setting) -> str:
        """Returns the setting's name."""
        return {"flag": known.flag, "key": known.flag.removeprefix("--"), "name": known.name}[self.style]

    def off(self, known: Setting) -> str:
        """Returns the text that sets the setting to false."""
        return known.off if self.style == "flag" else f"{self.said(known)} false"

    def on(self, known: Setting) -> str:
        """Returns how to switch the setting on."""
        return self.fix.format(self.said(known))


FLAGS = Words("flag", "add {}")
KEYS = Words("key", "add {} = true")
SET = Words("key", "/set {} true")
NAMES = Words("name", "set {}")


class Table:
    """Settings that can be given in the same place, by name."""

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self.settings = settings

    @classmethod
    def of(cls, *classes: type) -> "Table":
        """Returns the settings of these dataclasses."""
        return cls({known.name: known for each in classes for known in records_of(each).values()})

    def __or__(self, other: "Table") -> "Table":
        return Table({**self.settings, **other.settings})

    def only(self, *names: str) -> "Table":
        """Returns a table with these settings only."""
        return Table({name: self.settings[name] for name in names})

    def without(self, *names: str) -> "Table":
        """Returns a table without these settings."""
        return Table({name: known for name, known in self.settings.items() if name not in names})

    def beginning_with(self, *names: str) -> "Table":
        """Returns the same settings, with these first."""
        return Table({name: self.settings[name] for name in names}) | self

    @cached_property
    def _spelt(self) -> dict[str, Setting]:
        """All spellings, with underscores."""
        return {
            spelling.removeprefix("--").replace("-", "_"): known
            for known in self.settings.values()
            for spelling in (*known.flags, known.name)
        }

    def find(self, name: str) -> Setting | None:
        """Returns the setting of this name: its flag without dashes, its Python name or an alias.

        Dashes and underscores are the same.
        """
        return self._spelt.get(name.replace("-", "_"))

    def meant(self, name: str) -> Setting | None:
        """Returns the setting that a misspelt field of a batch line probably means; None if none is near."""
        # one letter and a word (n_predict) are too little to guess from: a line may have a field "predict"
        known = [spelling for spelling in self._spelt if spelling[1:2] not in ("", "_")]
        near = difflib.get_close_matches(name.replace("-", "_"), known, 1, cutoff=0.8)
        return self._spelt[near[0]] if near else None

    def misspelt(self, name: str) -> Setting | None:
        """Returns the setting that a field beside a prompt misspells; None if it may be one's own column.

        A short name (speed) is a column, and one that differs by more than two letters (completion_tokens).
        """
        near = self.meant(name)
        if near is None or len(name) < _LEAST_MISSPELT:
            return None
        known = [spelling for spelling in self._spelt if self._spelt[spelling] is near]
        return near if difflib.get_close_matches(name.replace("-", "_"), known, 1, cutoff=0.9) else None

    def unknown(self, name: str, words: Words) -> UsageError:
        """Returns the error for a setting that does not exist, with names that were probably meant."""
        said = {known.name: words.said(known) for known in self.settings.values()}
        spelt = {s: k.name for k in self.settings.values() for s in (k.name, k.flag.removeprefix("--"))}
        close = difflib.get_close_matches(name, spelt, 3, cutoff=0.57)
        near = dict.fromkeys(said[spelt[one]] for one in close)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the names are {', '.join(said.values())}"
        return UsageError(f"there is no setting {name!r}", hint)

    def read(self, values: Mapping[str, Any], words: Words) -> dict[str, Any]:
        """Returns the typed values, under the settings' own names. None counts as not given.

        Raises UsageError for a name that does not exist, for two names of one setting, and for a value of the
        wrong kind or out of range.
        """
        found: dict[str, Any] = {}
        spelt: dict[str, str] = {}
        for name, value in values.items():
            if value is None:
                continue
            known = self.find(name)
            if known is None:
                raise self.unknown(name, words)
            if known.name in found:
                raise UsageError(
                    f"{spelt[known.name]} and {name} are the same setting", "give only one of them"
                )
            found[known.name], spelt[known.name] = known.value(value, words.said(known)), name
        return found

    def read_text(self, name: str, text: str, words: Words) -> dict[str, Any]:
        """Returns one setting whose value was typed as text: a number, true or false, or the text itself."""
        import tomllib

        known = self.find(name)
        as_text = known is not None and known.kind in ("text", "texts", "path")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if as_text and not isinstance(value, str | list):
            value = text
        return self.read({name: value}, words)


def ranked(
    layers: Iterable[tuple[str, Given]], names: Iterable[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Ranks the sources: each setting's value comes from the first layer that has it.

    Args:
        layers: (source, what it gives), the strongest first.
    Returns:
        The values, and the source of each. Settings that no layer has are in neither.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    wanted = set(names)
    for source, given in layers:
        for name in given.keys() & wanted - values.keys():
            values[name], sources[name] = given[name], source
    return values, sources


def options_of(cls: type[T], *layers: tuple[str, Given]) -> T:
    """Returns the dataclass with the settings of these layers, the strongest first."""
    known = {each.name: each for each in records_of(cls).values()}
    values, _ = ranked(layers, known)
    return cls(**{known[name].field: value for name, value in values.items()})
