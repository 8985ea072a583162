"""The input lines of a batch, and the rows that answer them.

An input line is a row of a question file ({"prompt": text}, {"messages": [...]}, …; see `questions.asked`),
or a line of OpenAI's batch files ({"custom_id", "method", "url", "body"}). A line's own settings stand beside
the prompt, or in the body. A faulty line becomes a BadLine and does not stop the others. Output rows have
emlocal's own form or that of OpenAI's batch output.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from emlocal.answers.tool_calls import ToolCall, parsed
from emlocal.batch.messages import CHOICE, form_of_call, is_chat, is_neutral, tools_in
from emlocal.errors import UsageError
from emlocal.generation import Completion
from emlocal.generation.sample import complete_json, reasoning_json, summarize
from emlocal.methods import Outcome
from emlocal.methods.confidence import Confidence
from emlocal.methods.scoring import scores_json
from emlocal.models.templates import Message
from emlocal.questions.asked import CONVERSATIONS, field_of, kind, message, system_of, turns, with_own_system
from emlocal.questions.files import Form, is_by_lines, reading, rows, text_of_cell
from emlocal.settings.constraint import of_response_format
from emlocal.settings.resolve import CONSTRAINT, LINE
from emlocal.settings.table import shown
from emlocal.text import TOO_LONG, numbered_lines

_DEEPEST = 100
_MOST_DIGITS = 600  # Python's own limit is 4,300 digits by default and can be set as low as 640
_TOO_DEEP = f"lists and objects are nested more than {_DEEPEST} deep"
_FORM = "response_format"
_OWN = ("prompt", "messages", "custom_id", "raw", "system", _FORM)


@dataclass(frozen=True)
class Item:
    """A valid input line."""

    line: int
    """Line number, from 1."""
    custom_id: str | None
    messages: tuple[Message, ...] | None
    """The conversation; None if the line has a `prompt`."""
    prompt: str | None
    """The text; it is sent as a user's message unless `raw`."""
    raw: bool = False
    """Whether the prompt goes to the model without a template."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the line that emlocal does not use."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Tools that the model may call, in OpenAI's form."""
    system: str | None = None
    """The line's own system message, if it has a `prompt`; in `messages`, it is the first one."""

    def content(self) -> str:
        """Returns the text that identifies the line: its question and its settings, not its other fields."""
        said = self.messages and [dict(m) for m in self.messages]
        offered = [] if self.tools is None else [[*self.tools]]  # lines without tools keep their earlier keys
        system = [] if self.system is None else [{"system": self.system}]
        return canonical([said, self.prompt, self.raw, dict(self.overrides), *offered, *system])


@dataclass(frozen=True)
class BadLine:
    """An input line with an error."""

    line: int
    custom_id: str | None
    message: str
    content: str
    """The text that identifies the line when a run is resumed."""


def canonical(value: Any) -> str:
    """Returns the value as JSON; equal values give equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(*parts: str) -> str:
    """Returns a hash of these texts: 32 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass")
        hashed.update(len(raw).to_bytes(8, "little") + raw)
    return hashed.hexdigest()


def read_lines(stream: BinaryIO) -> Iterator[Item | BadLine]:
    """Yields the lines of a JSONL stream; skips blank ones."""
    for number, raw in numbered_lines(stream):
        if raw is None:
            yield BadLine(number, None, TOO_LONG, f"line {number}")
        elif raw.strip():
            yield parse_line(number, raw)


def read_file(stream: BinaryIO, form: Form | None, name: str) -> Iterator[Item | BadLine]:
    """Yields the lines of a question file; one without a known format is JSONL.

    Raises UsageError for a file that is broken from some place on: its rows before that are good.
    """
    with reading(name):
        if form is None or is_by_lines(stream, form):
            yield from read_lines(stream)
            return
        for number, value in rows(stream, form):
            yield parse_object(number, _settings_read(value) if form in ("csv", "tsv") else value)


def _settings_read(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of texts with its settings as numbers."""
    return {name: text_of_cell(v) if name == "raw" or LINE.find(name) else v for name, v in row.items()}


def parse_line(number: int, raw: bytes) -> Item | BadLine:
    """Parses one line of JSON."""
    try:
        value = strict_json(raw)
    except UnicodeDecodeError as why:
        said = f"byte 0x{raw[why.start]:02x} at column {why.start + 1:,} is not UTF-8"
        return BadLine(number, None, said, hashlib.blake2b(raw, digest_size=16).hexdigest())
    except ValueError as why:
        return BadLine(number, None, str(why), raw.decode())
    return parse_object(number, value)


def strict_json(raw: bytes) -> Any:
    """The value of a JSON text from anybody: no NaN, no infinity, no endless number, nothing deep.

    Raises UnicodeDecodeError for bytes that are not UTF-8, else ValueError with one line for people.
    """
    text = raw.decode()
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_integer)
    except json.JSONDecodeError as why:
        raise ValueError(f"not JSON: {why.msg} at column {why.colno:,}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except ValueError as why:
        raise ValueError(f"not JSON: {why}") from None
    if _is_too_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    """Parses a float. Raises ValueError for one that would become infinity, which a row cannot hold."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits is too long")
    return int(text)


def _is_too_deep(value: Any) -> bool:
    """Whether the value is nested so deeply that serialising it might fail."""
    level = [value]
    for _ in range(_DEEPEST):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        if not inner:
            return False
        level = [v for each in inner for v in each]
    return True


def parse_object(number: int, value: Any) -> Item | BadLine:
    """Checks one line's value: an object, or a string, which becomes the prompt."""
    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        return BadLine(number, None, f"{kind(value)} where an object is expected", canonical(value))
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as why:  # only from Python: NaN, a set, a list in itself
        return BadLine(number, None, f"this cannot be written as JSON: {why}", f"line {number}")
    given = value.get("custom_id")
    custom_id = given if isinstance(given, str) and given and _half_character(given) is None else None
    try:
        half = _half_character(text)
        if half is not None:
            raise UsageError(f"the text has half of a surrogate pair ({half})")
        if given is not None and custom_id is None:
            raise UsageError(f"custom_id is {shown(given)}; it must be a text that is not empty")
        return _openai(number, value) if _is_openai(value) else _own(number, value)
    except UsageError as error:
        said = error.message + (f" ({error.hint})" if error.hint else "")
        return BadLine(number, custom_id, said, canonical(value))


def _is_openai(value: Mapping[str, Any]) -> bool:
    """Whether it is a line of OpenAI's batch files: a mail's `body` beside a prompt is not one's body."""
    if "body" not in value or field_of(value) is None:
        return "body" in value
    body = value["body"]
    return isinstance(body, dict) and ("url" in value or "prompt" in body or "messages" in body)


def _own(number: int, value: Mapping[str, Any]) -> Item:
    overrides = {name: v for name, v in value.items() if LINE.find(name)}
    overrides |= _form(value, form_of_call(value) if _has_tools(value) else "")
    used = field_of(value)
    extra: dict[str, Any] = {}
    for name, v in value.items():
        if name in overrides or name in (*_OWN, used) or (name in ("tools", CHOICE) and _has_tools(value)):
            continue
        if near := LINE.misspelt(name):
            raise UsageError(f"there is no parameter {shown(name)}", f"did you mean {near.name}?")
        extra[name] = v
    raw = value.get("raw")
    if raw is not None and not isinstance(raw, bool):
        raise UsageError(f"raw is {shown(raw)}; it must be true or false")
    messages, prompt = _asked(value, used)
    system = system_of(value)
    if messages is not None:
        messages, system = with_own_system(messages, system), None
    elif raw and system is not None:
        raise UsageError(
            "system goes through the chat template, and this prompt is raw", "write its text into the prompt"
        )
    tools = tools_in(value) if _has_tools(value) else None
    return Item(number, value.get("custom_id"), messages, prompt, bool(raw), overrides, extra, tools, system)


def _asked(value: Mapping[str, Any], used: str | None) -> tuple[tuple[Message, ...] | None, str | None]:
    """Returns messages or a prompt from the line's field `used`."""
    if used is None or used == "messages" or (used == "prompt" and not isinstance(value[used], list)):
        return _question(value)
    said = turns(value, used, cut=used == CONVERSATIONS)
    return (said, None) if isinstance(value[used], list) else (None, value[used])


def _has_tools(value: Mapping[str, Any]) -> bool:
    """Whether "tools" are functions, not a column of one's own."""
    tools = value.get("tools")
    return isinstance(tools, list) and any(isinstance(tool, dict) and "function" in tool for tool in tools)


def _openai(number: int, value: Mapping[str, Any]) -> Item:
    body = value["body"]
    if not isinstance(body, dict):
        raise UsageError(f"body is {kind(body)}; it must be an object")
    chat = is_chat(value.get("url", "/v1/chat/completions"), value.get("method", "POST"))
    for name in value:
        if LINE.find(name) or name in ("messages", "prompt", "raw", "tools"):
            raise UsageError(f"{name} is outside the body", "move it into the body, or leave it out")
    overrides = _form(body, form_of_call(body))
    for name, v in body.items():
        if name in ("messages", "prompt", "tools", CHOICE, _FORM, *overrides) or v is None:
            continue
        if LINE.find(name):
            overrides[name] = v
        elif not is_neutral(name, v):
            near = LINE.meant(name)
            raise UsageError(
                f"there is no parameter {shown(name)} here", f"did you mean {near.name}?" if near else ""
            )
    messages, prompt = _question(body)
    extra = {k: v for k, v in value.items() if k not in ("custom_id", "method", "url", "body")}
    tools = tools_in(body)
    return Item(number, value.get("custom_id"), messages, prompt, not chat, overrides, extra, tools)


def _form(value: Mapping[str, Any], call: str) -> dict[str, Any]:
    """What a line says of the answer's form: `response_format` as the setting that it stands for, a schema as
    text, so that the order of its properties counts. `call`: the schema of a call that it asks for, or "".
    Raises UsageError."""
    named = {
        name: known for name in value if (known := LINE.find(name)) and known.name in CONSTRAINT.settings
    }
    given = value.get(_FORM)
    if call:
        if given is not None or named:
            raise UsageError(
                f"{CHOICE} asks for a call, whose form is fixed", f"leave {CHOICE} out, or the form"
            )
        return {"json_schema": call}
    if given is not None and named:
        raise UsageError(f"{_FORM} and {next(iter(named))} are the same setting", "give one of them")
    if given is not None:
        return {"json_schema": of_response_format(given)}
    schemas = (name for name, known in named.items() if known.name == "json_schema")
    return {name: named[name].value(value[name], name) for name in schemas if isinstance(value[name], dict)}


def _question(value: Mapping[str, Any]) -> tuple[tuple[Message, ...] | None, str | None]:
    prompt, messages = value.get("prompt"), value.get("messages")
    if (prompt is None) == (messages is None):
        raise UsageError("a line needs a prompt or messages" + ("" if prompt is None else ", not both"))
    if prompt is not None:
        if not isinstance(prompt, str):
            raise UsageError(f"prompt is {kind(prompt)}; it must be a text")
        if not prompt.strip():
            raise UsageError("the prompt is empty")
        return None, prompt
    if not isinstance(messages, list) or not messages:
        found = "empty" if messages == [] else kind(messages)
        raise UsageError(f"messages is {found}; it must be a list with at least one message")
    return tuple(message(i, m) for i, m in enumerate(messages)), None


def _half_character(text: str) -> str | None:
    """Returns the first half of a surrogate pair, or None. JSON can express one, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as why:
        return f"\\u{ord(text[why.start]):x}"
    return None


Row = dict[str, Any]
_ANSWERS = ("text", "answer", "tool_calls")
"""Fields of a row that contain the answer; they are null if it is withheld."""
ENDINGS = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}
"""Reasons for an answer's end: emlocal's, and OpenAI's for each."""


@dataclass(frozen=True)
class AnsweredLine:
    """An input line with its answer."""

    key: str
    custom_id: str
    model: str
    method: str
    seed: int
    outcome: Outcome
    extra: Mapping[str, Any]
    """Fields of the input line that are copied to the row."""
    entropies: bool = False
    """Whether emlocal's row lists the entropy of each token."""
    confidence: Confidence | None = None
    abstained: bool | None = None
    """Whether the answer is withheld because its confidence is too low. None: no limit was set."""
    tools: tuple[str, ...] = ()
    """Names of the tools that the line offered."""
    raw: bool = False
    """Whether the line's prompt went without a template, as those of `/v1/completions` do."""


def own_row(answered: AnsweredLine) -> Row:
    """Returns the row in emlocal's form."""
    outcome = answered.outcome
    chosen = outcome.completion
    row: Row = {
        "custom_id": answered.custom_id,
        "text": chosen.text,
        "finish_reason": chosen.finish_reason,
        **complete_json(chosen),
        **reasoning_json(chosen),
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
    if said := parsed(chosen.text, answered.tools).calls:
        row["tool_calls"] = _calls(answered.key, outcome.index, said)
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
        **complete_json(completion),
        **reasoning_json(completion),
        "completion_tokens": len(completion.tokens),
        "entropy": summarize(completion.draws).as_json(),
        "scores": scores_json(completion),
    }


def _calls(key: str, sample: int, calls: Sequence[ToolCall]) -> list[Row]:
    """Calls as OpenAI's API has them. Ids have nine digits: Mistral's templates take no others."""
    return [
        {
            "id": digest(key, str(sample), str(i))[:9],
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(dict(call.arguments), ensure_ascii=False),
            },
        }
        for i, call in enumerate(calls)
    ]


def choice(answered: AnsweredLine, index: int, withheld: bool) -> Row:
    """Returns a completion as OpenAI's API has it: of a chat with the tools that it calls, or a text."""
    completion = answered.outcome.completions[index]
    if answered.raw:
        ending = ENDINGS[completion.finish_reason]
        text = "" if withheld else completion.text
        return {"index": index, "text": text, "finish_reason": ending, "logprobs": None}
    said = parsed(completion.text, answered.tools)
    message: Row = {"role": "assistant", "content": None if withheld else said.text}
    if completion.reasoning_tokens:
        message["reasoning_content"] = completion.reasoning
    ending = ENDINGS[completion.finish_reason]
    if said.calls and not withheld:
        message["content"] = said.text or None
        message["tool_calls"] = _calls(answered.key, index, said.calls)
        ending = "tool_calls" if ending == "stop" else ending
    return {"index": index, "message": message, "finish_reason": ending, "logprobs": None}


def openai_row(answered: AnsweredLine) -> Row:
    """Returns the row in the form of OpenAI's batch output, with all other fields under "emlocal"."""
    own = own_row(answered)
    withheld = answered.outcome.index if answered.abstained else None
    choices = [choice(answered, i, i == withheld) for i in range(len(answered.outcome.completions))]
    body = {
        "id": f"emlocal-{answered.key}",
        "object": "text_completion" if answered.raw else "chat.completion",
        "created": int(time.time()),
        "model": answered.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": own["prompt_tokens"],
            "completion_tokens": own["completion_tokens"],
            "total_tokens": own["prompt_tokens"] + own["completion_tokens"],
        },
        "emlocal": beside(answered, own),
    }
    response = {"status_code": 200, "request_id": f"emlocal-{answered.key}", "body": body}
    return {"id": answered.key, "custom_id": answered.custom_id, "response": response, "error": None}


def beside(answered: AnsweredLine, own: Row) -> Row:
    """Returns the fields of emlocal's row that OpenAI's shapes have no place for."""
    names = [
        "complete",
        "entropy",
        "scores",
        "confidence",
        "confidence_from",
        "calibrated",
        "abstained",
        "withheld",
    ]
    names += ["method", "seed", "forward_passes", "seconds", *answered.outcome.fields, "kept"]
    return {name: own[name] for name in names if name in own}


def error_row(key: str, custom_id: str | None, line: int, message: str, *, openai: bool) -> Row:
    """Returns the row for a line that could not be answered."""
    if openai:
        error = {"code": "invalid_request", "message": message, "line": line}
        return {"id": key, "custom_id": custom_id, "response": None, "error": error}
    return {"custom_id": custom_id, "error": message, "line": line, "key": key}


def key_of(row: Mapping[str, object]) -> str:
    """Returns the key of a row of either form. Raises KeyError if it has none."""
    key = row["id"] if "response" in row else row["key"]
    if not isinstance(key, str):
        raise KeyError("key")
    return key


def is_error(row: Mapping[str, object]) -> bool:
    """Whether a row of either form reports an error."""
    return row.get("error") is not None
