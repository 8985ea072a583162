"""Finds out what a chat template does with messages, by rendering a few.

A template does not say whether it shows a system message, takes content as parts, or takes a tool call's
arguments as an object. So it renders conversations of marked words; it shows the words that come out. Each
template is tried once. In the process for templates one rendering takes a few tenths of a millisecond.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from emlocal.errors import ModelError
from emlocal.models.templates import Message, outcome, render

_SAID = {"system": "Qaz1 wsx", "user": "Edc2 rfv", "assistant": "Tgb3 yhn", "tool": "Ujm4 ikl"}
_KEY, _VALUE = "zqkey", "Plm5 okn"
_CALL = "zqcall"
_ID = "zqid56789"  # nine letters and digits, as Mistral's templates demand
_TOOL = {
    "type": "function",
    "function": {
        "name": _CALL,
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": []},
    },
}
Form = Literal["text", "parts"]
Fate = Literal["shown", "dropped", "refused"]
Arguments = Literal["object", "text"]


@dataclass(frozen=True)
class Traits:
    """The ways in which a template treats messages."""

    content: Form
    """The form in which it takes the content of messages."""
    user: Fate
    """Whether it shows, drops or refuses a question."""
    system: Fate
    """The same for a system message at the beginning."""


@dataclass(frozen=True)
class ToolTraits:
    """The ways in which a template treats tools."""

    tools: Fate
    """Whether it shows, drops or refuses their definitions."""
    arguments: Arguments
    """The form in which it takes the arguments of a call."""
    content: str | None
    """The content that it needs beside calls if a message has none."""
    calls: Fate
    """Whether it shows, drops or refuses calls."""
    results: Fate
    """The same for messages with role "tool"."""


def as_form(content: str, form: Form) -> Any:
    """Returns a content in this form."""
    return [{"type": "text", "text": content}] if form == "parts" else content


@lru_cache(maxsize=16)
def traits(template: str, bos: str = "", eos: str = "") -> Traits:
    """Returns what a template does with a question and a system message.

    Raises ModelError if it exceeds its bounds, EmlocalError and CancelledError as `render` does.
    """

    def fate(form: Form, *roles: str) -> Fate:
        messages = [_message(role, form) for role in roles]
        kind, text = _outcome(template, messages, bos, eos)
        if kind != "text":
            return "refused"
        return "shown" if all(_SAID[role] in text for role in roles) else "dropped"

    form: Form = "text"
    user = fate(form, "user")
    if user != "shown" and fate("parts", "user") == "shown":
        user, form = "shown", "parts"
    # one that takes no question at all wants something else, tools say: it is asked when they are there
    return Traits(form, user, "shown" if user == "refused" else fate(form, "system", "user"))


@lru_cache(maxsize=16)
def tool_traits(template: str, bos: str = "", eos: str = "") -> ToolTraits:
    """Returns what a template does with tools, calls and their results. Raises what `traits` raises."""
    form = traits(template, bos, eos).content
    kind, plain = _outcome(template, [_message("user", form)], bos, eos, [_TOOL])
    tools: Fate = "refused" if kind != "text" else "shown" if _CALL in plain else "dropped"
    found: list[tuple[int, int, bool, ToolTraits]] = []
    worth = {"shown": 2, "dropped": 1, "refused": 0}
    arguments: Arguments
    for arguments, content in (("object", None), ("object", ""), ("text", None), ("text", "")):
        kind, text = _outcome(template, _calling(form, arguments, content), bos, eos, [_TOOL])
        one = ToolTraits(tools, arguments, content, "refused", "refused")
        if kind == "text":
            bent = f"'{_KEY}'" in text or f'\\"{_KEY}' in text or text.count("None") > plain.count("None")
            calls = text.count(_CALL) > plain.count(_CALL) and _VALUE in text and not bent
            results = _SAID["tool"] in text
            one = ToolTraits(
                tools, arguments, content, *("shown" if good else "dropped" for good in (calls, results))
            )
            if calls and results:
                return one
        nothing = text.count("None") > plain.count("None")  # that there is no content, in a word
        found.append((worth[one.calls], worth[one.results], not nothing, one))
    return max(found, key=lambda way: way[:3])[3]


def opening(template: str, *, bos: str = "", eos: str = "", **variables: Any) -> str:
    """Returns the text with which the template begins an answer, such as "<|im_start|>assistant\\n".

    With the variable `enable_thinking` true and then false, it shows whether the prompt opens a thought.
    Raises what `render` raises.
    """
    asked = [_message("user", traits(template, bos, eos).content)]
    variables |= {"bos": bos, "eos": eos}
    after = render(template, asked, **{**variables, "add_generation_prompt": True})
    before = render(template, asked, **{**variables, "add_generation_prompt": False})
    differing = (i for i, (a, b) in enumerate(zip(after, before, strict=False)) if a != b)
    shared = next(differing, min(len(after), len(before)))
    inside = after.rfind("<", 0, shared)  # of "<|assistant|>" and "<|end|>" the first characters are the same
    if shared < len(before) and inside >= 0 and ">" not in after[inside:shared]:
        shared = inside
    return after[shared:]


@lru_cache(maxsize=16)
def switches_thoughts(template: str, bos: str = "", eos: str = "") -> bool:
    """Returns whether the prompt depends on `enable_thinking` or `thinking`.

    Also true if the template refuses a plain question, so that nobody can know.
    """
    asked = [_message("user", traits(template, bos, eos).content)]
    (kind, on), (_, off) = (
        outcome(template, asked, bos=bos, eos=eos, enable_thinking=think, thinking=think)
        for think in (True, False)
    )
    return kind != "text" or on != off


def _message(role: str, form: Form) -> Message:
    return {"role": role, "content": as_form(_SAID[role], form)}


def _calling(form: Form, arguments: Arguments, content: str | None) -> list[Message]:
    """Returns a question, a call, its result, and the assistant's answer."""
    given = {_KEY: _VALUE} if arguments == "object" else f'{{"{_KEY}": "{_VALUE}"}}'
    call = {"id": _ID, "type": "function", "function": {"name": _CALL, "arguments": given}}
    return [
        _message("user", form),
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {**_message("tool", form), "tool_call_id": _ID, "name": _CALL},
    ]


def _outcome(
    template: str,
    messages: Sequence[Message],
    bos: str,
    eos: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[str, str]:
    kind, text = outcome(template, messages, bos=bos, eos=eos, tools=tools)
    if kind == "stopped":  # each further question would take as long
        raise ModelError(f"the model's chat template was stopped: {text}", "use --raw to go without it")
    return kind, text
