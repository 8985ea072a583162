"""The form that an answer must have: a JSON schema, a regular expression or a grammar, as people give it.

This is the text alone; `emlocal.generation.constraints` makes masks from it. The module does not import
numpy: `--help` must be quick.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from emlocal.errors import ModelError, UsageError
from emlocal.files import read_regular
from emlocal.settings.table import Given, setting, shown

MOST_BYTES = 1 << 20
"""The most bytes of a schema, expression or grammar."""
DEEPEST = 100
"""The most levels of a JSON schema."""
Kind = Literal["json_schema", "regex", "grammar"]
NAMES: tuple[Kind, ...] = ("json_schema", "regex", "grammar")
INSTALL = "pip install 'emlocal[schema]'"
_WHAT: Mapping[Kind, str] = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "grammar": "the grammar",
}
ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True)
class Constraint:
    """The form that an answer must match, as text; never empty."""

    kind: Kind
    text: str

    @property
    def what(self) -> str:
        """The name for messages: "the JSON schema"."""
        return _WHAT[self.kind]


def _schema(given: Any, said: str) -> str:
    """Returns a JSON schema as text: a text unchanged, an object as JSON in its own order."""
    if isinstance(given, str):
        return given
    if not isinstance(given, Mapping | bool):
        raise UsageError(f"{said} is {shown(given)}; it must be a JSON schema: an object, true or false")
    try:
        return json.dumps(given, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as why:
        raise UsageError(f"{said} cannot be written as JSON: {why}") from None


_setting = partial(setting, None, panel="Constraints")


@dataclass(frozen=True, kw_only=True)
class ConstraintSettings:
    """Settings of the constraint. At most one is given; an empty text means none."""

    json_schema: str | None = _setting(
        "--json-schema --guided-json",
        help="Make the answer JSON that this schema allows.",
        metavar="FILE|TEXT",
        read=_schema,
    )
    regex: str | None = _setting(
        "--regex --guided-regex", help="Make the answer match this regular expression.", metavar="TEXT"
    )
    grammar: str | None = _setting(
        "--grammar --guided-grammar --grammar-file",
        help="Make the answer match this Lark or GBNF grammar.",
        metavar="FILE|TEXT",
    )

    @property
    def constraint(self) -> Constraint | None:
        """The constraint that is given, or None. Raises UsageError for two."""
        given = [Constraint(name, text) for name in NAMES if (text := vars(self)[name])]
        if len(given) > 1:
            said = " and ".join(each.kind for each in given)
            raise UsageError(f"{said} contradict each other: an answer has one form", "leave one of them out")
        return given[0] if given else None


def from_files(given: Given) -> Given:
    """Returns the same flags with the contents of the files that they name.

    It checks everything that can be checked without a model. Raises UsageError for a file that cannot be
    read, a schema that is not JSON, and a missing llguidance.
    """
    found = dict(given)
    for name in NAMES:
        text = found.get(name)
        if text:
            if name != "regex" and not _is_text(name, text):
                found[name] = _read(Path(text), f"--{name.replace('_', '-')}")
            check(Constraint(name, found[name]))
    return found


def _is_text(name: Kind, text: str) -> bool:
    """Returns whether this is the schema or grammar itself, not the path of its file."""
    if name == "json_schema":
        return text.lstrip()[:1] == "{" or text.strip() in ("true", "false")
    return "\n" in text or "::=" in text or text.startswith("start:")


def _read(path: Path, flag: str) -> str:
    try:
        return read_regular(path.expanduser(), MOST_BYTES).decode("utf-8-sig")
    except OSError as why:
        raise UsageError(
            f"{flag}: cannot read {str(path)[:200]}: {why.strerror}",
            "name a file, or give a JSON schema that begins with {" if "json" in flag else "name a file",
        ) from None
    except ModelError as why:
        raise UsageError(f"{flag}: {why.message}", why.hint) from None
    except (UnicodeDecodeError, ValueError) as why:
        raise UsageError(f"{flag}: {str(path)[:200]} is not a UTF-8 text: {why}") from None


def check(constraint: Constraint) -> None:
    """Raises UsageError for faults that can be found without a model."""
    if find_spec("llguidance") is None:
        raise UsageError(f"{constraint.what} needs llguidance, which is not installed", INSTALL)
    size = len(constraint.text.encode(errors="replace"))
    if size > MOST_BYTES:
        raise UsageError(f"{constraint.what} has {size:,} bytes; it may have {MOST_BYTES:,}")
    if constraint.kind == "json_schema":
        _check_json(constraint)


def _check_json(constraint: Constraint) -> None:
    try:
        schema = json.loads(constraint.text, parse_constant=_refuse)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as why:
        raise UsageError(f"the JSON schema is not JSON: {why}") from None
    if not isinstance(schema, dict | bool):
        raise UsageError(f"the JSON schema is {shown(schema)}; it must be an object, true or false")
    level: list[Any] = [schema]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> UsageError:
    return UsageError(f"the JSON schema is nested more than {DEEPEST} levels deep")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def of_response_format(given: Any) -> str:
    """Returns OpenAI's `response_format` as a JSON schema's text; "" for plain text.

    Raises UsageError for any other form.
    """
    kind = given.get("type") if isinstance(given, Mapping) else None
    if isinstance(given, Mapping) and kind == "text":
        return ""
    if isinstance(given, Mapping) and kind == "json_object":
        return ANY_OBJECT
    if isinstance(given, Mapping) and kind == "json_schema":
        inner = given.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if isinstance(schema, Mapping | bool):
            return _schema(schema, "response_format.json_schema.schema")
        raise UsageError("response_format has no json_schema.schema, or it is not an object")
    raise UsageError(f"response_format is {shown(given)}; its type must be text, json_object or json_schema")
