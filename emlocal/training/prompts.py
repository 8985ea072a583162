"""Prompts to train on, without labels: from JSONL, from text files, or from a dataset of the hub."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from emlocal.errors import EmlocalError, UsageError
from emlocal.jsonl import TOO_LONG, numbered_lines
from emlocal.models.hub import hub_rows
from emlocal.models.templates import Message

FIELDS = ("prompt", "question", "problem")
"""Where a line's prompt is looked for, after "messages"."""
_ROLES = ("system", "user", "assistant", "tool", "developer")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?", re.ASCII)
_FILES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".md", ".gz", ".parquet")
"""No dataset's name ends so: a file that is not there is meant."""
_JSON_LINE = (
    'a line is {"prompt": "…"}, {"question": "…"} or {"messages": [{"role": "user", "content": "…"}]}'
)
_SHOWN = 3  # of the lines that are wrong


@dataclass(frozen=True)
class Prompt:
    """What is said to the model. `answer` is for `--validate` alone; nothing is trained on it."""

    messages: tuple[Message, ...]
    answer: str | None = None
    where: str = ""
    """"train.jsonl, line 7", for messages."""


Source = str | Path | Iterable[str | Mapping[str, Any]]
"""A file or a dataset by its name, or prompts: texts, or objects as in a line of JSONL."""


def read_prompts(source: Source, *, limit: int | None = None) -> list[Prompt]:
    """The prompts of a .jsonl file (objects with "prompt", "messages", "question" or "problem"), of any
    other text file (one a line, blank lines left out), or of a dataset of the hub, NAME/NAME[:SPLIT].

    Raises UsageError for a file that is missing, empty, or has a line that is no prompt; nothing of it is
    used then.
    """
    if not isinstance(source, str | Path):
        return _sound(list(islice(map(_given, count(1), source), limit)), "the list", _JSON_LINE)
    source = str(source)
    path = Path(source).expanduser()
    if path.is_dir():
        raise UsageError(f"{source} is a folder", "give a file of prompts, .jsonl or text")
    if path.exists():
        found = list(islice(_of_file(path), limit))
    elif _HUB_NAME.fullmatch(source) and path.suffix not in _FILES:
        found = _of_hub(source, limit)
    else:
        raise UsageError(f"there is no file {source}", "give a .jsonl or text file, or ORG/NAME of the hub")
    json_lines = _is_json(path) or not path.exists()
    return _sound(found, source, _JSON_LINE if json_lines else "give text in UTF-8, a prompt a line")


def _sound(found: Sequence[Prompt | str], source: str, hint: str) -> list[Prompt]:
    """The prompts, where all are. Raises UsageError with what is wrong with those that are none."""
    wrong = [what for what in found if isinstance(what, str)]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN:,} more" if len(wrong) > _SHOWN else ""
        raise UsageError("; ".join(wrong[:_SHOWN]) + more, hint)
    prompts = [what for what in found if isinstance(what, Prompt)]
    if not prompts:
        raise UsageError(f"{source} holds no prompts")
    return prompts


def _given(number: int, value: str | Mapping[str, Any]) -> Prompt | str:
    where = f"prompt {number:,}"
    if isinstance(value, str):
        return _of_text(value, where) if value.strip() else f"{where}: empty"
    return _of_object(value, where) if isinstance(value, Mapping) else f"{where}: neither text nor object"


def _of_file(path: Path) -> Iterator[Prompt | str]:
    as_json = _is_json(path)
    try:
        with path.open("rb") as file:
            for number, raw in numbered_lines(file):
                where = f"{path.name}, line {number:,}"
                text = None if raw is None else _decoded(raw)
                if raw is None:
                    yield f"{where}: {TOO_LONG}"
                elif text is None:
                    yield f"{where}: not UTF-8"
                elif text.strip():
                    yield _of_json(text, where) if as_json else _of_text(text.strip(), where)
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why


def _is_json(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".json", ".ndjson")


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _of_json(text: str, where: str) -> Prompt | str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as why:
        return f"{where}: not JSON ({why})"
    return _of_object(value, where) if isinstance(value, dict) else f"{where}: not a JSON object"


def _of_object(value: Mapping[str, Any], where: str) -> Prompt | str:
    answer = value.get("answer")
    # what is no text or number is nothing to compare with
    answer = str(answer) if isinstance(answer, str | int | float) and not isinstance(answer, bool) else None
    if "messages" in value:
        messages = value["messages"]
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return _of_messages(
                [{"role": m["role"], "content": m["content"]} for m in messages], where, answer
            )
        return f'{where}: "messages" is no list of {{"role", "content"}}'
    for name in FIELDS:
        if name in value:
            text = value[name]
            if isinstance(text, str) and text.strip():
                return _of_messages([{"role": "user", "content": text}], where, answer)
            return f'{where}: "{name}" is no text, or empty'
    return f"{where}: none of {', '.join(('messages', *FIELDS))} is there"


def _of_messages(messages: Sequence[Message], where: str, answer: str | None) -> Prompt | str:
    """Up to where the model is to speak: what an assistant says at the end is an answer, no prompt."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not any(message["role"] == "user" for message in messages[:end]):
        return f'{where}: "messages" has none of the user'
    if not all(map(_is_unicode, (message["content"] for message in messages[:end]))):
        return f"{where}: half a character (a lone surrogate)"
    return Prompt(tuple(messages[:end]), answer, where)


def _is_unicode(text: str) -> bool:
    """JSON can name halves of characters, \\ud800 say; no encoding can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in _ROLES and isinstance(value.get("content"), str)


def _of_text(text: str, where: str) -> Prompt:
    return Prompt(({"role": "user", "content": text},), None, where)


def _of_hub(source: str, limit: int | None) -> list[Prompt | str]:
    name, _, split = source.partition(":")
    taken = hub_rows(name, split or "train", limit)
    return [_of_object(row, f"{source}, row {i:,}") for i, row in enumerate(taken, 1)]
