"""Prompts to train on, without labels: from question files, from text, or from a dataset of the hub.

Also measures accuracy before and after a run. Accuracy is information only: it decides nothing.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from emlocal.answers.gold import is_right
from emlocal.errors import EmlocalError, UsageError
from emlocal.files import atomic_writer
from emlocal.models.hub import hub_rows
from emlocal.models.templates import Message
from emlocal.questions.asked import ANSWER, FIELDS, field_of, system_of, turns, with_own_system
from emlocal.questions.files import NUMBERED, Form, form_of, is_by_lines, opened, reading, rows
from emlocal.text import TOO_LONG, numbered_lines, parse_json
from emlocal.training.rollouts import draw_rollouts

if TYPE_CHECKING:
    from emlocal.training.engines import Engines

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?", re.ASCII)
_FILES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".md", ".gz", ".parquet")
"""Suffixes that no dataset's name has: such a name means a missing file."""
_JSON_LINE = (
    'a line is {"prompt": "…"}, {"question": "…"} or {"messages": [{"role": "user", "content": "…"}]}'
)
_NAMED = tuple(name for name in FIELDS if name.islower())
_SHOWN = 3  # most faulty lines to show


@dataclass(frozen=True)
class Prompt:
    """Messages for the model. `answer` is only for `--validate` and the reward `verifier`."""

    messages: tuple[Message, ...]
    answer: str | None = None
    where: str = ""
    """Place for error messages: "train.jsonl, line 7"."""


Source = str | Path | Iterable[str | Mapping[str, Any]]
"""The name of a file or dataset, or prompts: texts, or objects as in a line of JSONL."""


def read_prompts(source: Source, *, limit: int | None = None) -> list[Prompt]:
    """Reads prompts from a file, a dataset of the hub, or a list.

    A .jsonl, .json, .csv, .tsv or .parquet file, gzipped or not, has rows as `questions.asked` describes. Any
    other text file has one prompt on each line; blank lines are skipped. A dataset is NAME/NAME[:SPLIT].

    Raises UsageError for a file that is missing or empty, or that has a line without a prompt; then nothing
    is used.
    """
    if not isinstance(source, str | Path):
        return _sound(list(islice(map(_given, count(1), source), limit)), "the list", _JSON_LINE)
    source = str(source)
    path = Path(source).expanduser()
    if path.is_dir():
        raise UsageError(f"{source} is a folder", "name a file of prompts, .jsonl, .csv or text")
    if path.exists():
        found = list(islice(_of_file(path, form_of(path)), limit))
    elif _HUB_NAME.fullmatch(source) and path.suffix not in _FILES:
        found = _of_hub(source, limit)
    else:
        raise UsageError(
            f"there is no file {source}", "name a .jsonl, .csv or text file, or ORG/NAME of the hub"
        )
    objects = form_of(path) is not None or not path.exists()
    return _sound(found, source, _JSON_LINE if objects else "use UTF-8 text with one prompt per line")


def _sound(found: Sequence[Prompt | str], source: str, hint: str) -> list[Prompt]:
    """Returns the prompts if all are valid. Raises UsageError that lists the faulty ones."""
    wrong = [what for what in found if isinstance(what, str)]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN:,} more" if len(wrong) > _SHOWN else ""
        raise UsageError("; ".join(wrong[:_SHOWN]) + more, hint)
    prompts = [what for what in found if isinstance(what, Prompt)]
    if not prompts:
        raise UsageError(f"{source} has no prompts")
    return prompts


def _given(number: int, value: str | Mapping[str, Any]) -> Prompt | str:
    where = f"prompt {number:,}"
    if isinstance(value, str):
        return _of_text(value, where) if value.strip() else f"{where}: empty"
    return (
        _of_object(value, where)
        if isinstance(value, Mapping)
        else f"{where}: this is neither a text nor an object"
    )


def _of_file(path: Path, form: Form | None) -> Iterator[Prompt | str]:
    """Yields the prompts of a file; text for the faulty ones. A file of no known format has one a line."""
    try:
        file = opened(path)
    except OSError as why:
        raise EmlocalError(f"cannot read {path}: {why.strerror or why}") from why
    with file, reading(str(path)):
        if form is None or is_by_lines(file, form):
            yield from _of_lines(file, path.name, form is not None)
            return
        for number, value in rows(file, form):
            where = f"{path.name}, {NUMBERED[form]} {number:,}"
            yield _of_object(value, where) if isinstance(value, dict) else f"{where}: not a JSON object"


def _of_lines(file: BinaryIO, name: str, as_json: bool) -> Iterator[Prompt | str]:
    for number, raw in numbered_lines(file):
        where = f"{name}, line {number:,}"
        text = None if raw is None else _decoded(raw)
        if raw is None:
            yield f"{where}: {TOO_LONG}"
        elif text is None:
            yield f"{where}: not UTF-8"
        elif text.strip():
            yield _of_json(text, where) if as_json else _of_text(text.strip(), where)


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
    name = field_of(value)
    if name is None:
        return f"{where}: none of {', '.join(_NAMED)} is there"
    try:
        said = with_own_system(turns(value, name, cut=True), system_of(value))
    except UsageError as why:
        return f"{where}: {why.message}"
    if not any(message["role"] == "user" for message in said):
        return f'{where}: "{name}" has no user message'
    if not _is_unicode(said):
        return f"{where}: the text has half of a surrogate pair"
    return Prompt(said, _answer(value), where)


def _answer(value: Mapping[str, Any]) -> str | None:
    """Returns the gold answer. One that is neither text nor number cannot be compared."""
    answer = next((value[name] for name in ANSWER if value.get(name) is not None), None)
    return str(answer) if isinstance(answer, str | int | float) and not isinstance(answer, bool) else None


def _is_unicode(said: Sequence[Message]) -> bool:
    """Whether all texts are Unicode.

    JSON can express half a surrogate pair, such as \\ud800; no encoding can.
    """
    try:
        json.dumps([dict(message) for message in said], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _of_text(text: str, where: str) -> Prompt:
    return Prompt(({"role": "user", "content": text},), None, where)


def _of_hub(source: str, limit: int | None) -> list[Prompt | str]:
    name, _, split = source.partition(":")
    taken = hub_rows(name, split or "train", limit)
    return [_of_object(row, f"{source}, row {i:,}") for i, row in enumerate(taken, 1)]


Counted = Callable[[int, int], None]
"""Receives the number done and the total."""
_STEP = 2**31  # no training step has this number, so validation has its own draws


def check_answers(prompts: Sequence[Prompt], asked_by: str) -> None:
    """Raises UsageError for a prompt without an answer to compare with."""
    for prompt in prompts:
        if prompt.answer is None or not prompt.answer.strip():
            raise UsageError(
                f"{prompt.where}: there is no answer to compare with",
                f'{asked_by} needs "answer" in each line',
            )


class Validation:
    """Accuracy before and after a run, stored in OUT/validation.json, so that a resumed run knows it."""

    def __init__(
        self, engines: "Engines[Any]", prompts: Sequence[Prompt], system: str | None, folder: Path
    ) -> None:
        """Encodes the prompts. Raises ContextFullError if no prompt leaves room for an answer."""
        self._engines = engines
        self._examples = engines.encoded(prompts, system) if prompts else []
        self._path = folder / "validation.json"
        asked = json.dumps([[tokens, prompt.answer] for prompt, tokens in self._examples])
        self._digest = hashlib.sha256(asked.encode()).hexdigest()

    def before(self, cancelled: Callable[[], bool], progress: Counted) -> float | None:
        """Returns the accuracy before the first step, measured unless it is stored; None without prompts."""
        if not self._examples:
            return None
        known = self._read()
        if known is None:
            known = self._accuracy(cancelled, progress)
            self._write({"before": known})
        return known

    def after(self, before: float, cancelled: Callable[[], bool], progress: Counted) -> float:
        """Measures the accuracy of the engines' current adapter."""
        accuracy = self._accuracy(cancelled, progress)
        self._write({"before": before, "after": accuracy})
        return accuracy

    def _accuracy(self, cancelled: Callable[[], bool], progress: Counted) -> float:
        """Returns the share of right answers, with one answer to each prompt at the rollouts' temperature.

        The answer is the content of the last \\boxed, or else the last number. The measurements before and
        after use the same draws.
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
        """Returns the stored accuracy from before the run, if it is for the same prompts."""
        try:
            held = parse_json(self._path.read_text(encoding="utf-8"))
            return float(held["before"]) if held["sha256"] == self._digest else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # then it is measured again

    def _write(self, accuracies: dict[str, float]) -> None:
        with atomic_writer(self._path) as file:
            json.dump({**accuracies, "prompts": len(self._examples), "sha256": self._digest}, file)
