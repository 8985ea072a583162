"""OpenAI's Responses API for text. Each request stands by itself; nothing is stored."""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emlocal.serve.engine_loop import Done, Drawn, Said
from emlocal.serve.errors import Refusal
from emlocal.serve.protocol import CHAT, Asked, House, alternatives_asked, question_asked, switch_in
from emlocal.serve.shapes import Answer, Object, answer_of, event, token_entry
from emlocal.settings.table import shown

_TEXTS = ("input_text", "output_text", "text")
_IGNORED = frozenset(
    {
        *("background", "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention"),
        *("safety_identifier", "service_tier", "store", "stream_options", "truncation", "user"),
    }
)
_WHOLE, _CHAT = "send the whole conversation as input", "/v1/chat/completions takes tools"
_MUST_BE_EMPTY = {
    "conversation": _WHOLE,
    "previous_response_id": _WHOLE,
    "prompt": _WHOLE,
    "reasoning": "/v1/chat/completions takes reasoning_effort",
    "tools": _CHAT,
    "tool_choice": _CHAT,
}
"""Fields that are refused, each with what helps."""
_LOGPROBS = "message.output_text.logprobs"


def read_response(house: House, body: Mapping[str, Any]) -> Asked:
    """Reads a request. Raises Refusal."""
    left = {name: value for name, value in body.items() if value is not None}
    _refuse_what_is_kept(left)
    left = {name: value for name, value in left.items() if name not in _IGNORED}
    stream, entropies = switch_in(left, "stream"), switch_in(left, "entropies")
    model = house.model(left.pop("model", None))
    messages = _messages(left.pop("input", None))
    instructions = left.pop("instructions", None)
    if instructions is not None:
        if not isinstance(instructions, str):
            raise _wrong("instructions", instructions, "a text")
        messages = [{"role": "system", "content": instructions}, *messages]
    if "max_output_tokens" in left:
        left["max_tokens"] = left.pop("max_output_tokens")
    for name in ("messages", "n"):
        if name in left:
            raise Refusal(400, f"there is no parameter {name} here", "unknown_parameter", name)
    top = _top(left)
    left["messages"] = messages
    asked = question_asked(house, CHAT, left, model, stream=stream, usage=True, top=top, entropies=entropies)
    if asked.plan.samples > 1 and not asked.settings.method.collecting.collects:
        raise Refusal(
            400, "a response is one answer: samples needs a method that chooses", "invalid_value", "samples"
        )
    return asked


def _refuse_what_is_kept(left: dict[str, Any]) -> None:
    """Raises Refusal for fields that need storage or calls of tools."""
    for name, helps in _MUST_BE_EMPTY.items():
        value = left.pop(name, None)
        if value and not (name == "tool_choice" and value in ("auto", "none")):
            raise Refusal(400, f"{name} is not supported: {helps}", "unsupported_parameter", name)
    if left.get("background") is True:
        raise Refusal(400, "background can only be false", "unsupported_parameter", "background")
    if left.get("truncation", "disabled") != "disabled":
        raise Refusal(400, "truncation can only be disabled: nothing is cut off silently",
                      "unsupported_parameter", "truncation")  # fmt: skip
    text = left.pop("text", None)
    if text is not None:
        left["response_format"] = _format(text)


def _format(text: Any) -> dict[str, Any]:
    """Returns `text.format` in the form of chat completions, where the schema is a level deeper.

    Raises Refusal.
    """
    form = text.get("format", {"type": "text"}) if isinstance(text, dict) else None
    if not isinstance(form, dict):
        raise _wrong("text", text, "an object with format")
    if form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
    return form


def _top(left: dict[str, Any]) -> int | None:
    include = left.pop("include", [])
    if not isinstance(include, list) or any(each != _LOGPROBS for each in include):
        raise _wrong("include", include, f"a list of {_LOGPROBS}")
    most = alternatives_asked(left.pop("top_logprobs", 0), "top_logprobs")
    return most if include or most else None


def _messages(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise _wrong("input", given, "a text or a list of messages")
    return [_message(i, each) for i, each in enumerate(given)]


def _message(index: int, item: Any) -> dict[str, Any]:
    where = f"input[{index}]"
    if not isinstance(item, dict) or item.get("type", "message") != "message":
        raise _wrong(where, item, "a message")
    content = item.get("content")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {} for part in content]
        texts = [part.get("text") for part in parts if part.get("type") in _TEXTS]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            raise _wrong(f"{where}.content", content, "text parts")
        content = "".join(map(str, texts))
    return {"role": item.get("role"), "content": content}


def _wrong(name: str, given: Any, expected: str) -> Refusal:
    return Refusal(400, f"{name} is {shown(given)}; it must be {expected}", "invalid_value", name)


@dataclass
class Responses:
    """The form of answers of `/v1/responses`."""

    asked: Asked
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    message: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    _number: int = 0
    _text: list[str] = field(default_factory=list)
    _drawn: list[Drawn] = field(default_factory=list)

    def whole(self, done: Done) -> Object:
        return self._response(answer_of(self.asked, done, self.id))

    def opening(self) -> Iterator[bytes]:
        yield self._event("response.created", response=self._response(None))
        yield self._event("response.in_progress", response=self._response(None))
        item = {**self._item("", [], "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place(), part=_part("", []))

    def said(self, said: Sequence[Said]) -> Iterator[bytes]:
        text = "".join(each.text for each in said)
        drawn = [each.drawn for each in said if each.drawn is not None]
        self._text.append(text)
        self._drawn += drawn
        if text or drawn:
            yield self._delta(text, drawn)

    def ending(self, done: Done) -> Iterator[bytes]:
        answer = answer_of(self.asked, done, self.id)
        if self.asked.chooses:
            self._text, self._drawn = [answer.texts[0] or ""], [*(answer.drawn[0] if answer.drawn else ())]
            yield self._delta(self._text[0], self._drawn)
        text, entries = "".join(self._text), [token_entry(each) for each in self._drawn]
        yield self._event("response.output_text.done", **self._place(), text=text, logprobs=entries)
        yield self._event("response.content_part.done", **self._place(), part=_part(text, entries))
        response = self._response(answer)
        item = response["output"][0]
        yield self._event("response.output_item.done", output_index=0, item=item)
        yield self._event(f"response.{response['status']}", response=response)

    def _delta(self, text: str, drawn: Sequence[Drawn]) -> bytes:
        entries = [token_entry(each) for each in drawn]
        return self._event("response.output_text.delta", **self._place(), delta=text, logprobs=entries)

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **fields}, kind)

    def _place(self) -> Object:
        return {"item_id": self.message, "output_index": 0, "content_index": 0}

    def _item(self, text: str, entries: Sequence[Object], status: str) -> Object:
        return {
            "id": self.message,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(text, entries)],
        }

    def _response(self, answer: Answer | None) -> Object:
        """Returns the response; without an answer, one in progress."""
        plan = self.asked.plan
        cut = answer is not None and answer.choices[0].finish_reason in ("length", "context")
        status = "in_progress" if answer is None else "incomplete" if cut else "completed"
        output = []
        if answer is not None:
            entries = [token_entry(each) for each in answer.drawn[0]] if answer.drawn else []
            output = [self._item(answer.texts[0] or "", entries, status)]
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.asked.model,
            "output": output,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": None,
            "metadata": {},
            "max_output_tokens": plan.max_tokens,
            "temperature": plan.params.temperature,
            "top_p": plan.params.top_p,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "tool_choice": "auto",
            "tools": [],
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "usage": None if answer is None else _usage(answer),
            "emlocal": None if answer is None else answer.own,
        }


def _part(text: str, entries: Sequence[Object]) -> Object:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*entries]}


def _usage(answer: Answer) -> Object:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
