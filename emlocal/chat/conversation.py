"""A conversation and its file, and the copy that is kept when a chat ends unexpectedly."""

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from emlocal.errors import EmlocalError, ModelError, UsageError
from emlocal.files import atomic_writer, data_dir, read_regular
from emlocal.models.templates import Message
from emlocal.text import parse_json, well_formed

FORMAT = "emlocal-chat-1"
_MOST_BYTES = 256 << 20  # largest saved conversation that is read
_LISTED = 8  # most saved chats in a message


@dataclass
class Conversation:
    """A system message and a list of questions with their answers."""

    system: str | None = None
    exchanges: list[tuple[str, str]] = field(default_factory=list)
    """(question, answer), oldest first."""

    def messages(self, question: str) -> list[Message]:
        """Returns the conversation as chat messages, `question` last."""
        said: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self.exchanges:
            said += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*said, {"role": "user", "content": question}]

    def save(self, path: Path, model: str, *, private: bool = False) -> None:
        """Writes the conversation as JSON, whole or not at all; with `private`, readable by its owner only.

        Raises UsageError for a pipe or a device, which cannot be loaded again, and EmlocalError if writing
        fails.
        """
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path} is not a regular file", "use /save with another name")
        if path.parent in (_chats(), _interrupted()):
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
            except OSError as why:
                raise EmlocalError(f"cannot write {path}: {why.strerror}") from why
        pairs = [{"question": well_formed(q), "answer": well_formed(a)} for q, a in self.exchanges]
        system = None if self.system is None else well_formed(self.system)
        content = {"format": FORMAT, "model": well_formed(model), "system": system, "exchanges": pairs}
        with atomic_writer(path, private=private) as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.write("\n")

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Reads a saved conversation. Raises UsageError if the file is missing or not a conversation."""
        try:
            content = parse_json(read_regular(path, _MOST_BYTES))
        except OSError as why:
            raise UsageError(f"cannot read {path}: {why.strerror}", _what_to_load()) from why
        except ModelError as why:  # a pipe, which would block, or a file that is too long
            raise UsageError(why.message, why.hint) from why
        except ValueError as why:
            raise UsageError(f"{path} is not a conversation: {why}", _what_to_load()) from why
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UsageError(f"{path} is not a conversation: its format is not {FORMAT!r}", _what_to_load())
        system, pairs = content.get("system"), content.get("exchanges")
        if not (system is None or isinstance(system, str)) or not _are_pairs(pairs):
            raise UsageError(f"{path} is not a conversation: its messages are not texts", _what_to_load())
        said = [(well_formed(pair["question"]), well_formed(pair["answer"])) for pair in pairs]
        return cls(None if system is None else well_formed(system), said)

    def keep(self, model: str) -> Path:
        """Writes the copy that `newest_kept` finds and returns its path. Raises EmlocalError.

        If emlocal's own folder cannot be written (a full disk), the copy goes into the folder for temporary
        files. There only its path finds it.
        """
        name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{os.getpid()}.json"
        path = _interrupted() / name
        try:
            self.save(path, model, private=True)
        except EmlocalError:
            path = Path(tempfile.mkdtemp(prefix="emlocal-chat-")) / name
            self.save(path, model, private=True)
        return path


def chat_file(name: str) -> Path:
    """Returns the file for a name: a path or an existing file as it is, else a file in emlocal's own folder.

    Raises UsageError if no file can have this name.
    """
    try:
        if "\0" in name:
            raise ValueError("it has a NUL character")
        path = Path(name).expanduser()
        if path.suffix == ".json" or len(path.parts) > 1 or path.is_file():
            path.exists()  # raises OSError if the name is too long
            return path
        own = _chats() / f"{name}.json"
        own.exists()
    except (OSError, RuntimeError, ValueError) as why:  # too long; no such home; a NUL
        said = why.strerror if isinstance(why, OSError) else str(why)
        raise UsageError(f"a file cannot be named {name[:60]!r}: {said}") from None
    return own


def new_file() -> Path:
    """Returns a file in emlocal's own folder that does not exist; its name is the time."""
    name = time.strftime("%Y-%m-%d-%H%M%S")
    path, more = _chats() / f"{name}.json", 1
    while path.exists():
        more += 1
        path = _chats() / f"{name}-{more}.json"
    return path


def newest_saved() -> Path:
    """Returns the chat that was saved last in emlocal's own folder. Raises UsageError if there is none."""
    saved = _newest_first(_chats())
    if not saved:
        raise UsageError("no chat is saved yet", "save one: /save NAME")
    return saved[0]


def newest_kept() -> Path:
    """Returns the copy of the chat that was interrupted last. Raises UsageError if there is none."""
    kept = _newest_first(_interrupted())
    if not kept:
        raise UsageError(
            "there is no interrupted chat to resume",
            "save a chat with /save NAME, then continue it with emlocal chat --load NAME",
        )
    return kept[0]


def _newest_first(folder: Path) -> list[Path]:
    """Returns the conversations in a folder. Raises UsageError if it cannot be read."""
    try:
        found = [(path.stat().st_mtime_ns, path.name, path) for path in folder.glob("*.json")]
    except OSError as why:
        raise UsageError(f"cannot read {folder}: {why.strerror}", f"make {folder} readable") from why
    return [path for _, _, path in sorted(found, reverse=True)]


def _what_to_load() -> str:
    """Returns the fix for a chat that cannot be loaded: the names of the saved ones."""
    names = [path.stem for path in _newest_first(_chats())]
    if not names:
        return "no chat is saved yet; save one: /save NAME"
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return f"load one of the saved chats: {', '.join(names[:_LISTED])}{more}"


def _chats() -> Path:
    return data_dir() / "chats"


def _interrupted() -> Path:
    return _chats() / "interrupted"


def _are_pairs(value: object) -> TypeGuard[list[dict[str, str]]]:
    return isinstance(value, list) and all(
        isinstance(pair, dict)
        and isinstance(pair.get("question"), str)
        and isinstance(pair.get("answer"), str)
        for pair in value
    )
