"""Conversations in the form that a model's chat template takes, and a check that the prompt has all of them.

Templates differ. Some take content as a text, others as parts; some take the arguments of a call as an
object, others as JSON; some take no system message (models/template_traits.py finds out). `fitted` gives a
conversation the form that the template takes. `left_out` finds messages that are missing in the rendered
prompt.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

from emlocal.backends.base import ModelInfo
from emlocal.errors import UsageError
from emlocal.models.template_traits import as_form, switches_thoughts, tool_traits, traits
from emlocal.models.templates import Message, outcome

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Dialogue(Sequence[Message]):
    """Messages, with the tools and variables that a template gets beside them."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Tools that the model may call, in the form of OpenAI's API."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template, such as `enable_thinking`; their values are those of JSON."""

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | Sequence[Message]:
        return self.messages[index]

    def __len__(self) -> int:
        return len(self.messages)

    @property
    def continues(self) -> bool:
        """Whether the last message is an unfinished answer, which the model continues."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def mapped(self, change: Callable[[str], str]) -> "Dialogue":
        """Returns the dialogue with each text of people or models changed, names and keys too."""
        messages = tuple({"role": m["role"], **_mapped(_without_role(m), change)} for m in self.messages)
        tools = None if self.tools is None else tuple(_mapped(tool, change) for tool in self.tools)
        return replace(self, messages=messages, tools=tools)

    def texts(self) -> Iterator[str]:
        """Yields the texts of people and models: contents, names, arguments, definitions of tools."""
        for value in (*map(_without_role, self.messages), *(self.tools or ())):
            yield from _texts(value)


def dialogue_of(messages: Sequence[Message]) -> Dialogue:
    """Returns the messages as a dialogue; a dialogue stays the same."""
    return messages if isinstance(messages, Dialogue) else Dialogue(tuple(messages))


def with_messages(asked: Sequence[Message], messages: Sequence[Message]) -> Dialogue:
    """Returns the dialogue with other messages and the same tools and variables."""
    return replace(dialogue_of(asked), messages=tuple(messages))


def text_of(message: Message) -> str:
    """Returns the text of a message's content. Raises UsageError for parts that are not text."""
    content = message["content"]
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise UsageError("a message has parts that are not text, and the model reads only text")
    return "".join(map(str, texts))


def template_of(info: ModelInfo, dialogue: Dialogue) -> str | None:
    """Returns the chat template for this dialogue; some models have another one for tools."""
    return info.tool_template if dialogue.tools and info.tool_template else info.chat_template


def fitted(info: ModelInfo, dialogue: Dialogue, warn: Warn) -> Dialogue:
    """Returns the dialogue in the form that the model's template takes.

    If the template refuses or drops a system message, its text goes before the first question, and `warn` is
    told. Raises UsageError for a dialogue that the model cannot answer.
    """
    template = template_of(info, dialogue)
    assert template is not None
    own = traits(template, info.bos, info.eos)
    if "enable_thinking" in dialogue.variables and not switches_thoughts(template, info.bos, info.eos):
        name = info.name
        warn(f"the chat template of {name} has no switch for thoughts: --think and --no-think do nothing")
    calls = any(m.get("tool_calls") or m["role"] == "tool" for m in dialogue)
    tool = tool_traits(template, info.bos, info.eos) if calls or dialogue.tools else None
    if tool is not None and dialogue.tools and tool.tools != "shown":
        warn(f"the chat template of {info.name} does not show tools: the model will not know of them")
    messages: list[Message] = []
    for message in dialogue:
        text: Any = text_of(message)
        changed = {**message, "content": as_form(text, own.content)}
        if message.get("tool_calls"):
            assert tool is not None
            changed["tool_calls"] = [
                _call(call, tool.arguments == "object") for call in message["tool_calls"]
            ]
            if not text:
                changed["content"] = tool.content
        messages.append(changed)
    if own.system != "shown" and [m["role"] for m in messages[:2]] == ["system", "user"]:
        system, question = text_of(messages[0]), text_of(messages[1])
        if system.strip():
            warn(
                f"the chat template of {info.name} takes no system message:"
                " its text goes in front of the first question"
            )
            question = f"{system}\n\n{question}"
        messages[:2] = [{**messages[1], "content": as_form(question, own.content)}]
    if dialogue.continues and dialogue[-1].get("tool_calls"):
        raise UsageError(
            "the last message is the assistant's call of a tool",
            'add what the tool gave: a message with the role "tool"',
        )
    return replace(dialogue, messages=tuple(messages))


def check_shown(info: ModelInfo, dialogue: Dialogue, rendered: str, warn: Warn) -> None:
    """Checks that the rendered prompt has each message.

    Raises UsageError if the question is missing. If another message is missing, `warn` is told.
    """
    missing = left_out(info, dialogue, rendered)
    if not missing:
        return
    asked = max((i for i, m in enumerate(dialogue) if m["role"] in ("user", "tool")), default=None)
    if asked in missing:
        raise UsageError(
            f"the chat template of {info.name} leaves out what is asked (the last message of the"
            f" {dialogue[asked]['role']})",
            "use another model, or send one text as it is: emlocal generate --raw",
        )
    for role in sorted({dialogue[i]["role"] for i in missing}):
        warn(f"the chat template of {info.name} leaves out a message of the {role}")


def left_out(info: ModelInfo, dialogue: Dialogue, rendered: str) -> list[int]:
    """Returns the indices of messages that are missing in the prompt.

    A template may trim a message, write it as JSON, or take the thoughts out of it. If the text itself is not
    found, the template is rendered again with a mark in its place, and the mark is looked for.
    """
    suspects = [
        i for i, m in enumerate(dialogue) if (text := text_of(m).strip()) and not _is_in(text, rendered)
    ]
    if not suspects:
        return []
    template = template_of(info, dialogue)
    assert template is not None
    marks = {i: f"Qaz{i}Wsx" for i in suspects}
    marked = [
        {**m, "content": as_form(marks[i], "text" if isinstance(m["content"], str) else "parts")}
        if i in marks
        else m
        for i, m in enumerate(dialogue)
    ]
    values = {"add_generation_prompt": not dialogue.continues, **dialogue.variables}
    kind, text = outcome(template, marked, bos=info.bos, eos=info.eos, tools=dialogue.tools, **values)
    return [i for i in suspects if marks[i] not in text] if kind == "text" else []


def _is_in(text: str, rendered: str) -> bool:
    """Whether the prompt has the text, as it is or written as JSON."""
    return text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered


def _call(call: Mapping[str, Any], as_object: bool) -> dict[str, Any]:
    """Returns a call with its arguments as an object, or as JSON."""
    function = dict(call["function"])
    arguments = function.get("arguments")
    if as_object and isinstance(arguments, str):
        try:
            found = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            function["arguments"] = found
    elif not as_object and not isinstance(arguments, str):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": function}


def _without_role(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "role"}


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(k): _mapped(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(item, change) for item in value]
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
