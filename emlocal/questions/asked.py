"""The question in a row of a question file, under the names that data sets give it.

A row has `messages`, `prompt` (a text, or messages), `conversations` (ShareGPT's turns), `question` or
`problem`. A field that is null counts as absent. `system` stands beside it. The answer is never part of the
question.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from emlocal.errors import UsageError
from emlocal.models.templates import Message
from emlocal.settings.table import shown

ROLES = ("system", "user", "assistant", "tool", "developer")
TEXTS = ("prompt", "question", "problem", "Problem", "Question")
"""Fields with the text of a question, in order."""
CONVERSATIONS = "conversations"
FIELDS = ("messages", "prompt", CONVERSATIONS, *TEXTS[1:])
"""Fields with a question. A row's first one that is not null counts."""
ANSWER = ("answer", "final_answer", "expected_answer", "target", "Answer")
"""Fields with a gold answer, in order."""
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""ShareGPT's speakers, and the role of each."""


def field_of(row: Mapping[str, Any]) -> str | None:
    """Returns the name of the field with the row's question."""
    return next((name for name in FIELDS if row.get(name) is not None), None)


def turns(row: Mapping[str, Any], name: str, *, cut: bool) -> tuple[Message, ...]:
    """Returns the messages in a field: a text is one message of the user.

    `cut`: leaves out the assistant's messages at the end, which are answers. Those of `conversations` always
    are. Raises UsageError that says what is wrong.
    """
    value = row[name]
    if name in TEXTS and isinstance(value, str):
        if not value.strip():
            raise UsageError(f"the {name} is empty", "write a text, or leave the row out")
        return ({"role": "user", "content": value},)
    if not isinstance(value, list) or (name in TEXTS and name != "prompt"):
        expected = "a text" if name in TEXTS else "a list with at least one message"
        raise UsageError(f"{name} is {kind(value)}; it must be {expected}")
    if not value:
        raise UsageError(f"{name} is empty; it must be a list with at least one message")
    said = [_turn(f"{name}[{i}]", turn) for i, turn in enumerate(value)] if name == CONVERSATIONS else value
    end = len(said)
    while (cut or name == CONVERSATIONS) and end and _role(said[end - 1]) == "assistant":
        end -= 1
    if not end:
        raise UsageError(f"{name} has only the assistant's messages", "add the user's message")
    return tuple(message(i, one, name) for i, one in enumerate(said[:end]))


def system_of(row: Mapping[str, Any]) -> str | None:
    """Returns the row's own system message; None if it has none. Raises UsageError if it is not a text."""
    value = row.get("system")
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise UsageError(f"system is {kind(value)}; it must be a text")
    return value


def with_own_system(said: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Returns the messages with the row's system message before them. Raises UsageError if they have one."""
    if system is None:
        return tuple(said)
    if said[0]["role"] == "system":
        raise UsageError("the row has a system message in its messages and one in system", "leave one out")
    return ({"role": "system", "content": system}, *said)


def _role(value: Any) -> Any:
    return value.get("role") if isinstance(value, dict) else None


def _turn(where: str, value: Any) -> Any:
    """Returns a turn of ShareGPT's as a message."""
    if not isinstance(value, dict) or "from" not in value:
        return value  # some sets have messages under this name
    if not isinstance(value["from"], str) or value["from"] not in _SPEAKERS:
        raise UsageError(f"{where}.from is {shown(value['from'])}; it must be one of {', '.join(_SPEAKERS)}")
    return {"role": _SPEAKERS[value["from"]], "content": value.get("value")}


def message(index: int, value: Any, name: str = "messages") -> Message:
    """Returns one message of the list `name`. Raises UsageError that says where it is wrong."""
    where = f"{name}[{index}]"
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {kind(value)}; it must be an object with role and content")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise UsageError(f"{where}.role is {shown(role)}; it must be one of {', '.join(ROLES)}")
    calls = value.get("tool_calls") if role == "assistant" else None
    if isinstance(content, list):  # OpenAI's parts
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        content = "".join(p for p in parts if isinstance(p, str))
        if not all(isinstance(p, str) for p in parts):
            raise UsageError(f"{where}.content has parts that are not text, and the model reads only text")
    if not (isinstance(content, str) or (content is None and calls)):
        raise UsageError(f"{where}.content is {kind(content)}; it must be a text")
    found: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
    if calls is not None and calls != []:
        if not isinstance(calls, list):
            raise UsageError(f"{where}.tool_calls is {kind(calls)}; it must be a list")
        found["tool_calls"] = [_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    if role == "tool":
        found |= {name: value[name] for name in ("tool_call_id", "name") if isinstance(value.get(name), str)}
    return found


def _call(where: str, value: Any) -> Mapping[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UsageError(f"{where} is {shown(value)}; it must have a function with a name and arguments")
    arguments = function.get("arguments", {})
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, str | dict):
        raise UsageError(f"{where}.function.arguments is {kind(arguments)}; it must be an object, or JSON")
    named = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def kind(value: Any) -> str:
    """What sort of JSON value it is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
