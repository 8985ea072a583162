"""The lines of a batch: what is asked, and the rows that are written.

Three forms of input are read, line by line: {"prompt": text}, {"messages": [...]}, and a line of OpenAI's
batch files ({"custom_id", "method", "url", "body"}). Settings of a line's own stand beside the prompt, or in
the body. What is wrong with a line becomes a BadLine; the others go on. Rows are emlocal's own, or lines of
OpenAI's batch output.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from emlocal.errors import UsageError
from emlocal.generation import Completion
from emlocal.generation.sample import summarize
from emlocal.methods import Outcome
from emlocal.methods.confidence import Confidence
from emlocal.methods.scoring import scores_json
from emlocal.models.templates import Message
from emlocal.settings.resolve import LINE
from emlocal.settings.table import shown
from emlocal.text import TOO_LONG, numbered_lines

_DEEPEST = 100
_MOST_DIGITS = 600  # Python itself refuses more than 4300, or as few as 640
_TOO_DEEP = f"lists and objects are nested more than {_DEEPEST} deep"
_ROLES = ("system", "user", "assistant", "tool", "developer")
_IGNORED_IN_BODY = frozenset({"model", "user", "metadata", "store", "service_tier"})
_ONLY_FALSE_IN_BODY = frozenset({"stream", "logprobs", "echo"})
_URLS = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True)
class Item:
    """A line that can be worked on."""

    line: int
    """Its number, from 1."""
    custom_id: str | None
    messages: tuple[Message, ...] | None
    """A conversation, or …"""
    prompt: str | None
    """… a text: a question, unless `raw`."""
    raw: bool = False
    """The prompt goes to the model as it is."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The line's other fields."""

    def content(self) -> str:
        """What identifies the line's content: its question and its own settings, not its other fields."""
        return canonical(
            [self.messages and [dict(m) for m in self.messages], self.prompt, self.raw, dict(self.overrides)]
        )


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be worked on."""

    line: int
    custom_id: str | None
    message: str
    content: str
    """What identifies it, when the run is resumed."""


def canonical(value: Any) -> str:
    """JSON with one spelling."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(*parts: str) -> str:
    """32 hexadecimal digits that identify these texts."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        hashed.update(len(raw).to_bytes(8, "little") + raw)
    return hashed.hexdigest()


def read_lines(stream: BinaryIO) -> Iterator[Item | BadLine]:
    """The lines of a JSONL stream; blank ones are passed over."""
    for number, raw in numbered_lines(stream):
        if raw is None:
            yield BadLine(number, None, TOO_LONG, f"line {number}")
        elif raw.strip():
            yield parse_line(number, raw)


def parse_line(number: int, raw: bytes) -> Item | BadLine:
    """One line of JSON."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as why:
        said = f"byte 0x{raw[why.start]:02x} at column {why.start + 1:,} is not UTF-8"
        return BadLine(number, None, said, hashlib.blake2b(raw, digest_size=16).hexdigest())
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer)
    except json.JSONDecodeError as why:
        return BadLine(number, None, f"not JSON: {why.msg} at column {why.colno:,}", text)
    except (RecursionError, ValueError) as why:
        said = _TOO_DEEP if isinstance(why, RecursionError) else f"not JSON: {why}"
        return BadLine(number, None, said, text)
    if _is_too_deep(value):
        return BadLine(number, None, _TOO_DEEP, text)
    return parse_object(number, value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    """What is larger than any float would be read as infinity, which no row can hold."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits is too long")
    return int(text)


def _is_too_deep(value: Any) -> bool:
    """Whether it is nested so deeply that writing it again might fail."""
    level = [value]
    for _ in range(_DEEPEST):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        if not inner:
            return False
        level = [v for each in inner for v in each]
    return True


def parse_object(number: int, value: Any) -> Item | BadLine:
    """One line's object, or a bare text, which is a prompt."""
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        return BadLine(number, None, f"{_kind(value)} where an object is expected", canonical(value))
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as why:  # from Python: a NaN, a set, a list in itself
        return BadLine(number, None, f"this cannot be written as JSON: {why}", f"line {number}")
    given = value.get("custom_id")
    custom_id = given if isinstance(given, str) and given and _half_character(given) is None else None
    try:
        half = _half_character(text)
        if half is not None:
            raise UsageError(f"the text has half a character ({half})")
        if given is not None and custom_id is None:
            raise UsageError(f"custom_id is {shown(given)}; it must be a text, and not empty")
        return _openai(number, value) if "body" in value else _own(number, value)
    except UsageError as error:
        said = error.message + (f" ({error.hint})" if error.hint else "")
        return BadLine(number, custom_id, said, canonical(value))


def _own(number: int, value: Mapping[str, Any]) -> Item:
    overrides = {name: v for name, v in value.items() if LINE.find(name)}
    extra: dict[str, Any] = {}
    for name, v in value.items():
        if name in overrides or name in ("prompt", "messages", "custom_id", "raw"):
            continue
        if near := LINE.meant(name):
            raise UsageError(f"there is no parameter {shown(name)}", f"did you mean {near.name}?")
        extra[name] = v
    raw = value.get("raw", False)
    if not isinstance(raw, bool):
        raise UsageError(f"raw is {shown(raw)}; it must be true or false")
    messages, prompt = _question(value)
    return Item(number, value.get("custom_id"), messages, prompt, raw, overrides, extra)


def _openai(number: int, value: Mapping[str, Any]) -> Item:
    body, url = value["body"], value.get("url", _URLS[0])
    if not isinstance(body, dict):
        raise UsageError(f"body is {_kind(body)}; it must be an object")
    if url not in _URLS or value.get("method", "POST") != "POST":
        asked = f"{value.get('method', 'POST')} to {url}"
        raise UsageError(f"only POST to {' or '.join(_URLS)} is answered, not {shown(asked)}")
    for name in value:
        if LINE.find(name) or name in ("messages", "prompt", "raw"):
            raise UsageError(f"{name} stands beside the body", "put it into the body, or leave it out")
    overrides = {}
    for name, v in body.items():
        if name in ("messages", "prompt") or name in _IGNORED_IN_BODY or v is None:
            continue
        if name in _ONLY_FALSE_IN_BODY:
            if v is not False:
                raise UsageError(f"{name} is {shown(v)}; here it can only be false")
            continue
        if not LINE.find(name):
            near = LINE.meant(name)
            raise UsageError(
                f"there is no parameter {shown(name)} here", f"did you mean {near.name}?" if near else ""
            )
        overrides[name] = v
    messages, prompt = _question(body)
    extra = {k: v for k, v in value.items() if k not in ("custom_id", "method", "url", "body")}
    return Item(number, value.get("custom_id"), messages, prompt, url == _URLS[1], overrides, extra)


def _question(value: Mapping[str, Any]) -> tuple[tuple[Message, ...] | None, str | None]:
    prompt, messages = value.get("prompt"), value.get("messages")
    if (prompt is None) == (messages is None):
        raise UsageError("a line needs a prompt, or messages" + ("" if prompt is None else ", not both"))
    if prompt is not None:
        if not isinstance(prompt, str):
            raise UsageError(f"prompt is {_kind(prompt)}; it must be a text")
        if not prompt.strip():
            raise UsageError("the prompt is empty")
        return None, prompt
    if not isinstance(messages, list) or not messages:
        found = "empty" if messages == [] else _kind(messages)
        raise UsageError(f"messages is {found}; it must be a list with at least one message")
    return tuple(_message(i, m) for i, m in enumerate(messages)), None


def _message(index: int, value: Any) -> Message:
    where = f"messages[{index}]"
    if not isinstance(value, dict):
        raise UsageError(f"{where} is {_kind(value)}; it must be an object with role and content")
    role, content = value.get("role"), value.get("content")
    if role not in _ROLES:
        raise UsageError(f"{where}.role is {shown(role)}; it must be one of {', '.join(_ROLES)}")
    if isinstance(content, list):  # OpenAI's parts
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        content = "".join(p for p in parts if isinstance(p, str))
        if not all(isinstance(p, str) for p in parts):
            raise UsageError(f"{where}.content has parts that are not text, and the model reads only text")
    if not isinstance(content, str):
        raise UsageError(f"{where}.content is {_kind(content)}; it must be a text")
    return {"role": "system" if role == "developer" else role, "content": content}


def _half_character(text: str) -> str | None:
    """Half a surrogate pair, if there is one: JSON can spell it and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as why:
        return f"\\u{ord(text[why.start]):x}"
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


Row = dict[str, Any]
_ANSWERS = ("text", "answer")
"""What a row has of the answer; where it is withheld, these are null."""
_ENDINGS = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


@dataclass(frozen=True)
class AnsweredLine:
    """A line with its answer."""

    key: str
    custom_id: str
    model: str
    method: str
    seed: int
    outcome: Outcome
    extra: Mapping[str, Any]
    """Fields of the line that are carried through."""
    entropies: bool = False
    """Whether emlocal's row has the entropy of each token."""
    confidence: Confidence | None = None
    abstained: bool | None = None
    """Whether the answer is withheld, because it is not sure enough; None: nobody asked for that."""


def own_row(answered: AnsweredLine) -> Row:
    """emlocal's row."""
    outcome = answered.outcome
    chosen = outcome.completion
    row: Row = {
        "custom_id": answered.custom_id,
        "text": chosen.text,
        "finish_reason": chosen.finish_reason,
        "prompt_tokens": outcome.timings.prompt_tokens,
        "cached_tokens": outcome.timings.cached_tokens,
        "completion_tokens": outcome.generated_tokens,
        "forward_passes": sum(job.forward_passes for job in outcome.jobs),
        "seconds": round(sum(job.seconds for job in outcome.jobs), 4),
        "entropy": summarize(chosen.draws).as_json(),
        "scores": scores_json(chosen),
        **({} if answered.confidence is None else answered.confidence.as_json()),
        "method": answered.method,
        "model": answered.model,
        "seed": answered.seed,
        **outcome.fields,
    }
    if len(outcome.completions) > 1:
        row["samples"] = [_sample(c) for c in outcome.completions]
    if answered.abstained is not None:
        row["abstained"] = answered.abstained
    if answered.abstained:
        row["withheld"] = {name: row[name] for name in _ANSWERS if name in row}
        row |= dict.fromkeys(row["withheld"])
    if outcome.drafts:
        row["rounds"] = [*outcome.drafts]
    if answered.entropies:
        row["entropies"] = {
            "before": [round(draw.entropy_before, 3) for draw in chosen.draws],
            "after": [round(draw.entropy_after, 3) for draw in chosen.draws],
        }
    if answered.extra:
        row["kept"] = dict(answered.extra)
    return row | {"key": answered.key}


def _sample(completion: Completion) -> Row:
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "completion_tokens": len(completion.tokens),
        "entropy": summarize(completion.draws).as_json(),
        "scores": scores_json(completion),
    }


def openai_row(answered: AnsweredLine) -> Row:
    """A line as OpenAI's batch output has it; what it has no place for is under "emlocal"."""
    own = own_row(answered)
    beside = ["entropy", "scores", "confidence", "confidence_from", "calibrated", "abstained", "withheld"]
    beside += ["method", "seed", "forward_passes", "seconds", *answered.outcome.fields, "kept"]
    withheld = answered.outcome.index if answered.abstained else None
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": None if i == withheld else c.text},
            "finish_reason": _ENDINGS[c.finish_reason],
            "logprobs": None,
        }
        for i, c in enumerate(answered.outcome.completions)
    ]
    body = {
        "id": f"emlocal-{answered.key}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": answered.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": own["prompt_tokens"],
            "completion_tokens": own["completion_tokens"],
            "total_tokens": own["prompt_tokens"] + own["completion_tokens"],
        },
        "emlocal": {name: own[name] for name in beside if name in own},
    }
    response = {"status_code": 200, "request_id": f"emlocal-{answered.key}", "body": body}
    return {"id": answered.key, "custom_id": answered.custom_id, "response": response, "error": None}


def error_row(key: str, custom_id: str | None, line: int, message: str, *, openai: bool) -> Row:
    """A line that could not be answered."""
    if openai:
        error = {"code": "invalid_request", "message": message, "line": line}
        return {"id": key, "custom_id": custom_id, "response": None, "error": error}
    return {"custom_id": custom_id, "error": message, "line": line, "key": key}


def key_of(row: Mapping[str, object]) -> str:
    """The key of a row of either form; raises KeyError where it has none."""
    key = row["id"] if "response" in row else row["key"]
    if not isinstance(key, str):
        raise KeyError("key")
    return key


def is_error(row: Mapping[str, object]) -> bool:
    """Whether a row of either form stands for a failure."""
    return row.get("error") is not None
