"""Conversations of several shapes, and an engine with any chat template."""

from dataclasses import replace
from typing import Any

from emlocal.backends.fake import FakeBackend

SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}
QUESTION: dict[str, Any] = {"role": "user", "content": "Is 2 < 3?"}
TALK = [SYSTEM, QUESTION, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And 3 < 2?"}]
ANSWERED = [QUESTION, {"role": "assistant", "content": "Let me see. "}]
PARTS = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (SYSTEM, QUESTION)]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
}
RESULT: dict[str, Any] = {
    "role": "tool",
    "tool_call_id": "abcdef123",
    "name": "get_weather",
    "content": "rain",
}
CALLING = [
    {"role": "user", "content": "How is Oslo's weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    RESULT,
    {"role": "assistant", "content": "It rains."},
    {"role": "user", "content": "And tomorrow?"},
]


def backend_with(template: str | None, **info: Any) -> FakeBackend:
    """A fake engine whose model has this chat template; its tokens are bytes."""
    backend = FakeBackend(context=1 << 16)
    backend.info = replace(backend.info, chat_template=template, **info)
    return backend
