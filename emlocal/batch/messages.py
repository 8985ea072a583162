"""Checks of tools and addresses of OpenAI's API, and the fields of it that have no meaning here."""

import json
import re
from collections.abc import Mapping
from typing import Any

from emlocal.answers.tool_calls import schema_of_call
from emlocal.errors import UsageError
from emlocal.questions.asked import kind
from emlocal.settings.table import shown

MOST_TOOLS = 128
CHOICE = "tool_choice"
IGNORED = frozenset({"model", "user", "metadata", "store", "service_tier", "safety_identifier"}) | {
    *("prompt_cache_key", "prompt_cache_retention", "stream_options", "parallel_tool_calls"),
}
"""Fields that do not change an answer."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "verbosity": ("medium",),
}
"""Fields that emlocal does not support, each with the values that switch it off."""
_URL = re.compile(
    r"(?:https?://[^/?#]+)?(?:/openai)?(?:/deployments/[^/?#]+|/v1)?(?P<chat>/chat)?/completions(?:\?[^#]*)?"
)


def is_neutral(name: str, value: Any) -> bool:
    """Whether a field of a body may be ignored. Raises UsageError for a value that is not supported."""
    if name in IGNORED or value is None:
        return True
    if name not in _NEUTRAL:
        return False
    allowed = _NEUTRAL[name]
    if not any(value == one and type(value) is type(one) for one in allowed):
        words = " or ".join(json.dumps(one) for one in allowed)
        raise UsageError(f"{name} is {shown(value)}; only {words} is supported")
    return True


def is_chat(url: Any, method: Any) -> bool:
    """Whether an address of OpenAI or Azure is that of chats, not of completions.

    Raises UsageError for other addresses.
    """
    found = _URL.fullmatch(url) if isinstance(url, str) else None
    if found is None or method != "POST":
        asked = shown(f"{method} to {url}")
        raise UsageError(f"only POST to /v1/chat/completions or /v1/completions is supported, not {asked}")
    return found["chat"] is not None


def tools_in(value: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """Returns the tools that a line or a body offers; none with "tool_choice": "none". Raises UsageError."""
    tools = value.get("tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or len(tools) > MOST_TOOLS:
        said = kind(tools) if not isinstance(tools, list) else f"a list of {len(tools):,}"
        raise UsageError(f"tools is {said}; it must be a list of at most {MOST_TOOLS} functions")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UsageError(
                f'tools[{i}] is {shown(tool)}; it must be {{"type": "function", "function": {{"name": …}}}}'
            )
    return None if value.get(CHOICE) == "none" else tuple(tools)


def form_of_call(value: Mapping[str, Any]) -> str:
    """Returns the JSON schema of the call that `tool_choice` asks for; "" where the model may choose.

    "required" is a call of any tool, {"type": "function", "function": {"name": …}} of that one. Raises
    UsageError for other values, and for a call of a tool that is not offered.
    """
    choice = value.get(CHOICE)
    if choice is None or choice in ("auto", "none"):
        return ""
    tools = tools_in(value) or ()
    if choice != "required":
        function = choice.get("function") if isinstance(choice, dict) else None
        if not isinstance(function, dict) or choice.get("type") != "function" or "name" not in function:
            raise UsageError(
                f'{CHOICE} is {shown(choice)}; it must be "auto", "none", "required", or'
                ' {"type": "function", "function": {"name": …}}'
            )
        name = function["name"]
        tools = tuple(tool for tool in tools if tool["function"]["name"] == name)
        if not tools:
            raise UsageError(f"{CHOICE} names {shown(name)}, which is not among the tools")
    if not tools:
        raise UsageError(f"{CHOICE} is {shown(choice)}, but there are no tools")
    return json.dumps(schema_of_call(tools), ensure_ascii=False)
