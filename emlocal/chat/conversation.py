"""What has been said, its file format, and the copy that is kept when a chat ends unforeseen."""

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from emlocal.errors import EmlocalError, ModelError, UsageError
from emlocal.files import atomic_writer
from emlocal.models.paths import data_dir
from emlocal.models.regular import read_regular
from emlocal.models.templates import Message
from emlocal.text import parse_json, well_formed

FORMAT = "emlocal-chat-1"
_MOST_BYTES = 256 << 20  # of a saved conversation


@dataclass
class Conversation:
    """A system message, and questions and answers in turn."""

    system: str | None = None
    exchanges: list[tuple[str, str]] = field(default_factory=list)
    """(question, answer), oldest first."""

    def messages(self, question: str) -> list[Message]:
        """All of it as chat messages, `question` last."""
        said: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self.exchanges:
            said += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*said, {"role": "user", "content": question}]

    def save(self, path: Path, model: str, *, private: bool = False) -> None:
        """Write it as JSON, whole or not at all; `private`: for its owner only.

        Raises UsageError for a pipe or a device, which no chat could go on with; EmlocalError.
        """
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(f"{path} is not a regular file", "give /save another name")
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
        """Read a saved one. Raises UsageError for a missing file or one that is no conversation."""
        try:
            content = parse_json(read_regular(path, _MOST_BYTES))
        except OSError as why:
            raise UsageError(f"cannot read {path}: {why.strerror}") from why
        except ModelError as why:  # a pipe would be waited for; or it is too long
            raise UsageError(why.message, why.hint) from why
        except ValueError as why:
            raise UsageError(f"{path} is no conversation: {why}") from why
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UsageError(f"{path} is no conversation: it does not say {FORMAT!r}")
        system, pairs = content.get("system"), content.get("exchanges")
        if not (system is None or isinstance(system, str)) or not _are_pairs(pairs):
            raise UsageError(f"{path} is no conversation: its messages are not texts")
        said = [(well_formed(pair["question"]), well_formed(pair["answer"])) for pair in pairs]
        return cls(None if system is None else well_formed(system), said)

    def keep(self, model: str) -> Path:
        """Write the copy that `newest_kept` finds, and return where it is. Raises EmlocalError.

        Where emlocal's own folder cannot be written (a full disk), it goes into the folder for temporary
        files, where only its path finds it.
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
    """The file that a name means: a path or an existing file as it is, else one in emlocal's own folder.

    Raises UsageError for what no file can be called.
    """
    try:
        if "\0" in name:
            raise ValueError("it has a NUL character")
        path = Path(name).expanduser()
        if path.suffix == ".json" or len(path.parts) > 1 or path.is_file():
            path.exists()  # raises where the name is too long
            return path
        own = _chats() / f"{name}.json"
        own.exists()
    except (OSError, RuntimeError, ValueError) as why:  # too long; the home of nobody; a NUL byte
        said = why.strerror if isinstance(why, OSError) else str(why)
        raise UsageError(f"no file can be called {name[:60]!r}: {said}") from None
    return own


def newest_kept() -> Path:
    """The copy of the chat that ended unforeseen last. Raises UsageError if there is none."""
    try:
        kept = [(path.stat().st_mtime_ns, path.name, path) for path in _interrupted().glob("*.json")]
    except OSError as why:
        raise UsageError(f"cannot read {_interrupted()}: {why.strerror}") from why
    if not kept:
        raise UsageError(
            "no chat was interrupted: there is nothing to resume",
            "/save NAME in a chat keeps a conversation; emlocal chat --load NAME goes on with it",
        )
    return max(kept)[2]


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
