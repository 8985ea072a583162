"""A conversation on a backend: questions in, events out. Knows nothing of terminals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from emlocal.backends.base import Backend
from emlocal.chat.conversation import Conversation
from emlocal.errors import ContextFullError, UsageError
from emlocal.generation import Completed, Event, Runner, Timings, Token
from emlocal.generation.prompt import Asked, prompt_tokens
from emlocal.methods import Chosen, Outcome
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.confidence import Calibration, Confidence, confidence_of, subject_of
from emlocal.sampling.draw import request_key
from emlocal.settings import EMInf, Plan

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
