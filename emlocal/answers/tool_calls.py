"""Calls of tools in an answer, in the forms that models are trained to write.

    Hermes, Qwen    <tool_call>{"name": "f", "arguments": {…}}</tool_call>, several of them, after a text
    Llama 3         {"name": "f", "parameters": {…}}, alone; with <|python_tag|> before it; several with ";"
    Mistral         [TOOL_CALLS][{"name": "f", "arguments": {…}}, …], or [TOOL_CALLS]f[ARGS]{…}

Engines drop control tokens from the text: "[TOOL_CALLS]" and "<|python_tag|>" may be missing. A bare object
or list is therefore a call only if it names one of the offered tools. Everything else stays text, and so does
a broken call. The functions are pure. An answer may come in pieces; the result is that of the whole text.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_HERMES, _HERMES_END = "<tool_call>", "</tool_call>"
_PYTHON, _MISTRAL, _ARGS = "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"
_OPENERS = (_HERMES, _PYTHON, _MISTRAL)
MOST_CALLS = 128
"""The most calls of one answer; an answer with more stays text."""


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: Mapping[str, Any]


class Said(NamedTuple):
    """An answer, parted into text and calls."""

    text: str
    """The text without the calls."""
    calls: tuple[ToolCall, ...]


class CallReader:
    """Reads an answer piece by piece, and returns text as soon as it cannot be part of a call."""

    def __init__(self, tools: Collection[str]) -> None:
        """`tools`: the names of the offered tools; without any, everything is text."""
        self._tools = frozenset(tools)
        self._held = ""
        self._begun = False  # whether something other than white space was said
        self.calls: tuple[ToolCall, ...] = ()
        """The calls so far. Most forms are certain only when the answer ends."""

    def feed(self, piece: str) -> str:
        """Takes the next piece of the answer. Returns text that is not part of a call."""
        if not self._tools:
            return piece
        self._held += piece
        if not self._begun:
            start = self._held.lstrip()
            if not start or start[0] in "{[" or start.startswith(_OPENERS):
                self._begun = bool(start) and start.startswith(_OPENERS)
                return ""  # it may be a call, to its end
            self._begun = True
        found = [at for opener in _OPENERS if (at := self._held.find(opener)) >= 0]
        sure = min(found) if found else len(self._held) - _half_opener(self._held)
        text, self._held = self._held[:sure], self._held[sure:]
        return text

    def end(self) -> str:
        """Ends the answer. Returns the rest of its text."""
        text, self.calls = _calls_in(self._held, self._tools) if self._tools else Said(self._held, ())
        self._held = ""
        return text


def parsed(answer: str, tools: Collection[str]) -> Said:
    """Returns the text of an answer and its calls. `tools`: the names of the offered tools."""
    reader = CallReader(tools)
    text = reader.feed(answer) + reader.end()
    return Said(text.rstrip() if reader.calls else text, reader.calls)


def _half_opener(text: str) -> int:
    """Returns the length of the longest beginning of an opener at the text's end."""
    longest = max(map(len, _OPENERS)) - 1
    return next(
        (n for n in range(min(longest, len(text)), 0, -1) if any(o.startswith(text[-n:]) for o in _OPENERS)),
        0,
    )


def _calls_in(text: str, tools: frozenset[str]) -> Said:
    """Parts a text that begins with a call, if it does."""
    start = text.lstrip()
    found: Sequence[ToolCall] | None
    if start.startswith(_HERMES):
        return _hermes(start, text)
    if start.startswith(_MISTRAL):
        found = _mistral(start)
    elif start.startswith(_PYTHON):
        found = _llama(start.removeprefix(_PYTHON))
    else:
        found = _list(start) if start.startswith("[") else _llama(start)
        if not found or any(call.name not in tools for call in found):
            return _after_text(text, tools)
    if not found or len(found) > MOST_CALLS:
        return Said(text, ())
    return Said("", tuple(found))


def _after_text(text: str, tools: frozenset[str]) -> Said:
    """Parts a text in which calls may follow other text."""
    found = [at for opener in _OPENERS if (at := text.find(opener)) > 0]
    if not found:
        return Said(text, ())
    said, calls = _calls_in(text[min(found) :], tools)
    return Said(text[: min(found)] + said, calls)


def _hermes(start: str, whole: str) -> Said:
    """Reads <tool_call>…</tool_call>, and text between and after them. The last end may be missing."""
    calls, texts = list[ToolCall](), list[str]()
    left = start
    while left:
        before, opener, after = left.partition(_HERMES)
        texts.append(before)
        if not opener:
            break
        value, end = _json_at(after)
        call = _call(value, "arguments")
        rest = after[end:].lstrip()
        if call is None or (rest and not rest.startswith(_HERMES_END)) or len(calls) == MOST_CALLS:
            return Said(whole, ())
        calls.append(call)
        left = rest.removeprefix(_HERMES_END)
    text = "".join(texts)
    return Said(text if text.strip() else "", tuple(calls))


def _mistral(start: str) -> list[ToolCall] | None:
    """Reads both forms of Mistral. A name may have an id: f[CALL_ID]abc[ARGS]{…}."""
    found: list[ToolCall] = []
    for part in start.split(_MISTRAL)[1:]:
        if part.lstrip().startswith("["):
            calls = _list(part)
            if calls is None:
                return None
            found += calls
            continue
        name, args, rest = part.partition(_ARGS)
        value, end = _json_at(rest)
        call = _call({"name": name.split("[CALL_ID]")[0].strip(), "arguments": value}, "arguments")
        if not args or call is None or rest[end:].strip():
            return None
        found.append(call)
    return found


def _list(text: str) -> list[ToolCall] | None:
    """Reads [{"name", "arguments"}, …]; None if anything follows it."""
    value, end = _json_at(text)
    if not isinstance(value, list) or text[end:].strip():
        return None
    calls = [_call(item, "arguments") for item in value]
    return [call for call in calls if call] if all(calls) else None


def _llama(text: str) -> list[ToolCall] | None:
    """Reads {"name", "parameters"}, or several with ";" between them; None if anything follows."""
    found: list[ToolCall] = []
    left = text
    while left.strip() or not found:
        value, end = _json_at(left)
        call = _call(value, "parameters") or _call(value, "arguments")
        left = left[end:].lstrip()
        if call is None or (left and not left.startswith(";")):
            return None
        found.append(call)
        left = left.removeprefix(";")
    return found


def _call(value: Any, key: str) -> ToolCall | None:
    """Returns the call that this value is, or None. Some models write the arguments as JSON in a text."""
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get(key)
    if isinstance(arguments, str):
        arguments, end = _json_at(arguments)
        if end < len(value[key].rstrip()):
            return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments)


def _json_at(text: str) -> tuple[Any, int]:
    """Returns the JSON value at the beginning of a text, and where it ends; (None, 0) without one."""
    start = len(text) - len(text.lstrip())
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, 0


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def schema_of_call(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the JSON schema of a bare call of one of these tools, which are in OpenAI's form.

    References within the parameters of a tool are moved to where those are in this schema.
    """
    parameters, calls = {}, []
    for i, tool in enumerate(tools):
        function = tool["function"]
        place = f"#/$defs/{i}"
        parameters[str(i)] = _moved(function.get("parameters") or {"type": "object"}, place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": {"$ref": place}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"$defs": parameters, "anyOf": calls}


def _moved(schema: Any, place: str) -> Any:
    """Returns a schema whose references to its own root point to `place`."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    if isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#"):
        moved["$ref"] = place + schema["$ref"][1:]
    return moved
