"""Prompts to train on, without labels: from JSONL, from text files, or from a dataset of the hub.

And the share of answers that are right before and after a run.

Accuracy is for information only: nothing is decided by it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emlocal.answers.gold import is_right
from emlocal.errors import EmlocalError, UsageError
from emlocal.files import atomic_writer
from emlocal.models.hub import hub_rows
from emlocal.models.templates import Message
from emlocal.text import TOO_LONG, numbered_lines, parse_json
from emlocal.training.rollouts import draw_rollouts

if TYPE_CHECKING:
    from emlocal.training.engines import Engines

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


Counted = Callable[[int, int], None]
"""Takes how many are done, and of how many."""
_STEP = 2**31  # of no training step: the draws are the validation's own


def check_answers(prompts: Sequence[Prompt], asked_by: str) -> None:
    """Raise UsageError for a prompt without an answer to compare with."""
    for prompt in prompts:
        if prompt.answer is None or not prompt.answer.strip():
            raise UsageError(
                f"{prompt.where}: no answer to compare with", f'{asked_by} needs "answer" in each line'
            )


class Validation:
    """Accuracy before and after a run, kept in OUT/validation.json: a run that is resumed knows both."""

    def __init__(
        self, engines: "Engines[Any]", prompts: Sequence[Prompt], system: str | None, folder: Path
    ) -> None:
        """Raises ContextFullError where no prompt leaves room for an answer."""
        self._engines = engines
        self._examples = engines.encoded(prompts, system) if prompts else []
        self._path = folder / "validation.json"
        asked = json.dumps([[tokens, prompt.answer] for prompt, tokens in self._examples])
        self._digest = hashlib.sha256(asked.encode()).hexdigest()

    def before(self, cancelled: Callable[[], bool], progress: Counted) -> float | None:
        """Of the model as it is before the first step; measured unless it is known. None: not asked for."""
        if not self._examples:
            return None
        known = self._read()
        if known is None:
            known = self._accuracy(cancelled, progress)
            self._write({"before": known})
        return known

    def after(self, before: float, cancelled: Callable[[], bool], progress: Counted) -> float:
        """Of the adapter that the engines have now."""
        accuracy = self._accuracy(cancelled, progress)
        self._write({"before": before, "after": accuracy})
        return accuracy

    def _accuracy(self, cancelled: Callable[[], bool], progress: Counted) -> float:
        """The share of prompts answered rightly, one answer each at the rollouts' temperature.

        The answer is what the last \\boxed holds, else the last number; before and after share their draws.
        """
        engines = self._engines
        tokens = [tokens for _, tokens in self._examples]
        progress(0, len(tokens))
        rollouts = draw_rollouts(
            engines.answerer.backend,
            tokens,
            engines.settings,
            _STEP,
            engines.answerer.parallel,
            cancelled=cancelled,
            progress=lambda done: progress(done, len(tokens)),
        )
        pairs = zip(self._examples, rollouts, strict=True)
        return sum(is_right(rollout.text, prompt.answer or "") for (prompt, _), rollout in pairs) / len(
            tokens
        )

    def _read(self) -> float | None:
        """What was measured before, of these very prompts."""
        try:
            held = parse_json(self._path.read_text(encoding="utf-8"))
            return float(held["before"]) if held["sha256"] == self._digest else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # to be measured, then

    def _write(self, accuracies: dict[str, float]) -> None:
        with atomic_writer(self._path) as file:
            json.dump({**accuracies, "prompts": len(self._examples), "sha256": self._digest}, file)
