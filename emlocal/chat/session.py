"""A conversation on a backend: questions in, events out. Knows nothing of terminals.

`Conversation` is what has been said, with its file format, and the copy that is kept when a chat ends
unforeseen.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeGuard

from emlocal.backends.base import Backend
from emlocal.errors import ContextFullError, EmlocalError, ModelError, UsageError
from emlocal.files import atomic_writer, data_dir, read_regular
from emlocal.generation import Completed, Event, Runner, Timings, Token
from emlocal.generation.prompt import Asked, prompt_tokens
from emlocal.methods import Chosen, Outcome
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.confidence import Calibration, Confidence, confidence_of, subject_of
from emlocal.models.templates import Message
from emlocal.sampling.draw import request_key
from emlocal.settings import EMInf, Plan
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


AnswerEvent = Token | Completed | Answered
_ROOM = "/undo or /clear makes room; emlocal chat --context N gives more"


@dataclass(frozen=True)
class Turn:
    """The settings of one answer."""

    plan: Plan
    method: Chosen = field(default_factory=Chosen)


@dataclass
class Totals:
    """Of the whole chat."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    generation_seconds: float = 0.0

    def add(self, timings: Timings) -> None:
        """Count one answer."""
        self.answers += 1
        self.prompt_tokens += timings.prompt_tokens
        self.cached_tokens += timings.cached_tokens
        self.generated_tokens += timings.generated_tokens
        self.generation_seconds += timings.generation_seconds


class ChatSession:
    """One conversation with one model.

    Draws are keyed by the turn and by how often it was answered: the same seed and the same inputs give the
    same chat, and /regen gives another answer.
    """

    def __init__(
        self,
        backend: Backend,
        runner: Runner,
        conversation: Conversation | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Several sessions may have one runner; each finds what it has read."""
        self.backend = backend
        self.runner = runner
        self.conversation = conversation or Conversation()
        self._calibration = calibration
        self.last: Outcome | None = None
        """What the last answer came from, with its draws …"""
        self.last_turn: Turn | None = None
        """… and its settings, which may have changed since."""
        self.timings = Timings()
        """Of what ran last, answer or comparison."""
        self.context_used = 0
        """Tokens of the conversation, up to the last answer."""
        self.totals = Totals()
        self._attempt = 0

    def ask(self, question: str, turn: Turn, cancelled: Callable[[], bool]) -> Iterator[AnswerEvent]:
        """Answer a question; it joins the conversation with what was said, even if that was cut off.

        Raises:
            ContextFullError: the conversation does not fit; nothing has changed.
            CancelledError: stopped before the answer began; nothing has changed.
            UsageError: the model's template refuses the conversation.
        """
        asked = self._question(question, turn, cancelled)
        for event in ask_one(self.runner, turn.method.collecting, asked, cancelled):
            if isinstance(event, Answered):
                self.last, self.last_turn = outcome, _ = event.asking.result(), turn
                self.timings = outcome.timings
                self.context_used = outcome.jobs[0].timings.prompt_tokens + len(outcome.completion.tokens)
                self.conversation.exchanges.append((question, outcome.completion.text))
                self.totals.add(self.timings)
                self._attempt = 0
            yield event

    def confidence(self) -> Confidence | None:
        """How sure the last answer is; None where there is none."""
        if self.last is None or self.last_turn is None:
            return None
        turn = self.last_turn
        subject = subject_of(self.backend.info.name, turn.method, turn.plan)
        return confidence_of(self.last, subject, self._calibration)

    def ask_again(self, turn: Turn, cancelled: Callable[[], bool]) -> Iterator[AnswerEvent]:
        """Answer the last question again, from other draws; the new answer takes the old one's place."""
        question, answer = self.take_back()
        self._attempt += 1
        attempt = self._attempt
        replaced = False
        try:
            for event in self.ask(question, turn, cancelled):
                replaced = replaced or isinstance(event, Answered)
                yield event
        finally:
            if not replaced:
                self.conversation.exchanges.append((question, answer))
            self._attempt = attempt

    def compare(self, turn: Turn, cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Answer the last question twice from the same draws: sample 0 without EM, sample 1 with it.

        The conversation stays as it is. Where EM is off, the comparison is with its default settings.
        """
        question, answer = self.take_back()
        params = turn.plan.params
        sides = [replace(params, em=None), replace(params, em=params.em or EMInf())]
        try:
            one = replace(turn, plan=replace(turn.plan, samples=1))
            job = self._question(question, one, cancelled).job()
        finally:
            self.conversation.exchanges.append((question, answer))
        requests = [replace(job.requests[0], params=side) for side in sides]
        for event in self.runner.follow([replace(job, requests=requests)], cancelled):
            self.timings = event.handle.timings
            yield event

    def take_back(self) -> tuple[str, str]:
        """Remove the last question and answer and return them. Raises UsageError if there is none."""
        if not self.conversation.exchanges:
            raise UsageError("nothing has been asked yet")
        return self.conversation.exchanges.pop()

    def forget(self) -> None:
        """Start over; the system message stays."""
        self.conversation.exchanges.clear()
        self.last, self.context_used = None, 0
        self._attempt = 0

    def _question(self, question: str, turn: Turn, cancelled: Callable[[], bool]) -> Question:
        return Question(
            self.conversation.messages(question),
            turn.plan,
            partial(self._prompt, cancelled=cancelled),
            request_key(f"turn {len(self.conversation.exchanges)}"),
            self._attempt,
            at_once=True,
            session=self,
        )

    def _prompt(self, asked: Asked, cancelled: Callable[[], bool]) -> list[int]:
        try:
            tokens = prompt_tokens(self.backend, asked, cancelled)
        except ContextFullError as error:
            raise ContextFullError(error.message, _ROOM) from None
        if len(tokens) >= self.backend.context:
            raise ContextFullError(
                f"the conversation has {len(tokens):,} tokens with this message;"
                f" the context holds {self.backend.context:,}",
                _ROOM,
            )
        return tokens
