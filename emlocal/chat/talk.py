"""What a chat is to its terminal: a conversation, questions in, pieces of answers out.

`session.ChatSession` answers with a model here, `connected.ConnectedSession` with one on a server.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from emlocal.chat.conversation import Conversation
from emlocal.errors import UsageError
from emlocal.generation import Completed, Timings, Token
from emlocal.generation.dialogue import Warn
from emlocal.generation.prompt import once
from emlocal.methods import Chosen
from emlocal.methods.asking import Answered
from emlocal.settings import Given, Plan


@dataclass(frozen=True)
class Turn:
    """The settings of one answer."""

    plan: Plan
    method: Chosen = field(default_factory=Chosen)
    given: Given = field(default_factory=dict)
    """The settings that were chosen by flags, /set or the config file. A server is sent these alone."""


@dataclass
class Totals:
    """Totals of the whole chat."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    generation_seconds: float = 0.0

    def add(self, timings: Timings) -> None:
        """Adds one answer."""
        self.answers += 1
        self.prompt_tokens += timings.prompt_tokens
        self.cached_tokens += timings.cached_tokens
        self.generated_tokens += timings.generated_tokens
        self.generation_seconds += timings.generation_seconds


class Piece(NamedTuple):
    """Some text of an answer."""

    text: str
    entropy: float = 0.0
    """Entropy of its first token before EM, in nats; 0 if unknown."""
    thought: str = ""
    """Text of the thought before the answer."""


AnswerEvent = Token | Completed | Answered | Piece
"""Events of an answer: an engine's, or pieces of text from a server."""


class Shown(NamedTuple):
    """A token as /entropy shows it; entropies in nats."""

    text: str
    """"": a token without text, such as the end."""
    entropy_before: float
    entropy_after: float
    p_before: float
    p_after: float
    em: bool
    """Whether EM acted on its row."""
    changed: bool
    """Whether the same draw gives another token without EM."""
    instead: str | None
    """The text of that token, if it is known."""


class Talk(ABC):
    """One conversation with one model."""

    name: str
    """The model's name."""
    context: int | None
    """The most tokens of the conversation; None if that is unknown."""

    def __init__(self, conversation: Conversation | None, warn: Warn) -> None:
        self.conversation = conversation or Conversation()
        self.warn = once(warn)
        """Says each text once."""
        self.last_turn: Turn | None = None
        """Settings of the last answer; the chat's may have changed since. None without a last answer."""
        self.context_used = 0
        """Tokens of the conversation up to the last answer."""
        self.totals = Totals()
        self._attempt = 0

    @abstractmethod
    def ask(self, question: str, turn: Turn, cancelled: Callable[[], bool]) -> Iterator[AnswerEvent]:
        """Answers a question and adds both to the conversation, even if the answer was cut off.

        Raises CancelledError if it was stopped before the answer began, and other EmlocalErrors; then nothing
        has changed.
        """

    @abstractmethod
    def summary(self) -> str:
        """Returns one line on the last answer: tokens, speed, entropy and how it ended."""

    @abstractmethod
    def details(self) -> list[str]:
        """Returns lines on how sure the last answer is."""

    @abstractmethod
    def shown(self) -> list[Shown]:
        """Returns the tokens of the last answer; none if they are unknown."""

    @abstractmethod
    def check_whole(self, *, quiet: bool) -> None:
        """Reports a last answer that is not whole. Raises EmlocalError if it does not meet its constraint."""

    def ask_again(self, turn: Turn, cancelled: Callable[[], bool]) -> Iterator[AnswerEvent]:
        """Answers the last question again with other draws; the new answer replaces the old one."""
        question, answer = self.take_back()
        exchanges = self.conversation.exchanges
        before, attempt = len(exchanges), self._attempt + 1
        self._attempt = attempt
        try:
            yield from self.ask(question, turn, cancelled)
        finally:
            if len(exchanges) == before:
                exchanges.append((question, answer))
            self._attempt = attempt

    def take_back(self) -> tuple[str, str]:
        """Removes the last question and answer and returns them. Raises UsageError if there are none."""
        if not self.conversation.exchanges:
            raise UsageError("there is no question yet", "ask one first")
        return self.conversation.exchanges.pop()

    def drop_last(self) -> None:
        """Forgets what is known of the last answer."""
        self.last_turn = None

    def forget(self) -> None:
        """Clears the conversation but keeps the system message."""
        self.conversation.exchanges.clear()
        self.drop_last()
        self.context_used = self._attempt = 0
