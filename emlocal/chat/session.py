"""A conversation on a backend: questions in, events out. Knows nothing of terminals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from emlocal.backends.base import Backend
from emlocal.chat.conversation import Conversation
from emlocal.errors import ContextFullError, UsageError
from emlocal.generation import Completion, Generator, Request, Timings
from emlocal.generation.decode import Event
from emlocal.generation.prompt import chat_tokens
from emlocal.sampling import Uniforms
from emlocal.sampling.draw import request_key
from emlocal.settings import EMInf, SamplingParams

_ROOM = "/undo or /clear makes room; emlocal chat --context N gives more"


@dataclass(frozen=True)
class Turn:
    """The settings of one answer."""

    params: SamplingParams
    seed: int
    max_tokens: int
    stop: tuple[str, ...] = ()


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

    def __init__(self, backend: Backend, conversation: Conversation | None = None) -> None:
        self.backend = backend
        self.conversation = conversation or Conversation()
        self.last: Completion | None = None
        """The last answer, with its draws …"""
        self.last_timings = Timings()
        """… what it took …"""
        self.last_turn: Turn | None = None
        """… and its settings, which may have changed since."""
        self.totals = Totals()
        self._generator = Generator(backend)
        self._attempt = 0

    @property
    def timings(self) -> Timings:
        """Of what ran last, answer or comparison."""
        return self._generator.timings

    def context_used(self) -> int:
        """Tokens that the model holds of the conversation."""
        return self._generator.held

    def ask(self, question: str, turn: Turn, cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Answer a question; it joins the conversation with what was said, even if that was cut off.

        Raises:
            ContextFullError: the conversation does not fit; nothing has changed.
            CancelledError: stopped before the answer began; nothing has changed.
            UsageError: the model's template refuses the conversation.
        """
        prompt = self._prompt(question, cancelled)
        request = self._request(turn)
        for event in self._generator.run(prompt, [request], cancelled):
            if isinstance(event, Completion):
                self.last, self.last_timings, self.last_turn = event, self.timings, turn
                self.conversation.exchanges.append((question, event.text))
                self.totals.add(self.timings)
                self._attempt = 0
            yield event

    def ask_again(self, turn: Turn, cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Answer the last question anew, from other draws; the new answer takes the old one's place."""
        question, answer = self.take_back()
        self._attempt += 1
        attempt = self._attempt
        replaced = False
        try:
            for event in self.ask(question, turn, cancelled):
                replaced = replaced or isinstance(event, Completion)
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
        off = replace(turn.params, em=None)
        on = replace(turn.params, em=turn.params.em or EMInf())
        try:
            prompt = self._prompt(question, cancelled)
            requests = [self._request(replace(turn, params=params)) for params in (off, on)]
        finally:
            self.conversation.exchanges.append((question, answer))
        yield from self._generator.run(prompt, requests, cancelled)

    def take_back(self) -> tuple[str, str]:
        """Remove the last question and answer and return them. Raises UsageError if there is none."""
        if not self.conversation.exchanges:
            raise UsageError("nothing has been asked yet")
        return self.conversation.exchanges.pop()

    def forget(self) -> None:
        """Start over; the system message stays."""
        self.conversation.exchanges.clear()
        self.last = None
        self._attempt = 0

    def _request(self, turn: Turn) -> Request:
        key = request_key(f"turn {len(self.conversation.exchanges)}")
        return Request(turn.params, Uniforms(turn.seed, key, self._attempt), turn.max_tokens, turn.stop)

    def _prompt(self, question: str, cancelled: Callable[[], bool]) -> list[int]:
        try:
            tokens = chat_tokens(self.backend, self.conversation.messages(question), cancelled)
        except ContextFullError as error:
            raise ContextFullError(error.message, _ROOM) from None
        if len(tokens) >= self.backend.context:
            raise ContextFullError(
                f"the conversation has {len(tokens):,} tokens with this message;"
                f" the context holds {self.backend.context:,}",
                _ROOM,
            )
        return tokens
