"""What has been said, and its file format."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from emlocal.errors import EmlocalError, UsageError
from emlocal.files import atomic_writer
from emlocal.models.paths import data_dir
from emlocal.models.templates import Message

FORMAT = "emlocal-chat-1"


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

    def save(self, path: Path, model: str) -> None:
        """Write it as JSON, whole or not at all. Raises EmlocalError."""
        if path.parent == _chats():
            try:
                _chats().mkdir(parents=True, exist_ok=True)
            except OSError as why:
                raise EmlocalError(f"cannot write {path}: {why.strerror}") from why
        pairs = [{"question": q, "answer": a} for q, a in self.exchanges]
        content = {"format": FORMAT, "model": model, "system": self.system, "exchanges": pairs}
        with atomic_writer(path) as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.write("\n")

    @classmethod
    def load(cls, path: Path) -> "Conversation":
        """Read a saved one. Raises UsageError for a missing file or one that is no conversation."""
        try:
            content = json.loads(path.read_bytes())
        except OSError as why:
            raise UsageError(f"cannot read {path}: {why.strerror}") from why
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as why:
            raise UsageError(f"{path} is no conversation: {why}") from why
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UsageError(f"{path} is no conversation: it does not say {FORMAT!r}")
        system, pairs = content.get("system"), content.get("exchanges")
        if not (system is None or isinstance(system, str)) or not _are_pairs(pairs):
            raise UsageError(f"{path} is no conversation: its messages are not texts")
        return cls(system, [(pair["question"], pair["answer"]) for pair in pairs])


def chat_file(name: str) -> Path:
    """The file that a name means: a path or an existing file as it is, else one in emlocal's own folder."""
    path = Path(name).expanduser()
    if path.suffix == ".json" or len(path.parts) > 1 or path.is_file():
        return path
    return _chats() / f"{name}.json"


def _chats() -> Path:
    return data_dir() / "chats"


def _are_pairs(value: object) -> TypeGuard[list[dict[str, str]]]:
    return isinstance(value, list) and all(
        isinstance(pair, dict)
        and isinstance(pair.get("question"), str)
        and isinstance(pair.get("answer"), str)
        for pair in value
    )
