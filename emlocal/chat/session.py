"""A conversation on an engine: questions in, events out. It knows nothing of terminals."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from emlocal import rendering
from emlocal.backends.base import Backend
from emlocal.chat.conversation import Conversation
from emlocal.chat.talk import AnswerEvent, Shown, Talk, Turn
from emlocal.errors import ContextFullError
from emlocal.generation import Event, Runner, Timings
from emlocal.generation.dialogue import Warn
from emlocal.generation.prompt import Asked, prompt_tokens, unheard
from emlocal.methods import Outcome
from emlocal.methods.asking import Answered, Question, ask_one
from emlocal.methods.confidence import Calibration, Confidence, confidence_of, subject_of
from emlocal.methods.hints import without_effect
from emlocal.methods.scoring import scores_of
from emlocal.sampling import Draw
from emlocal.sampling.draw import request_key
from emlocal.settings import EMInf

_ROOM = "make room with /undo or /clear, or restart with a larger --context"


class ChatSession(Talk):
    """A conversation with a model on this machine.

    The draws depend on the seed, the number of the turn and how often it was answered. The same seed and
    inputs give the same chat, and /regen gives another answer.
    """

    def __init__(
        self,
        backend: Backend,
        runner: Runner,
        conversation: Conversation | None = None,
        calibration: Calibration | None = None,
        warn: Warn = unheard,
    ) -> None:
        """Starts a chat.

        Several sessions may share a runner; each reuses the tokens that it has already read.

        `warn` takes a text for people.
        """
        super().__init__(conversation, warn)
        self.name, self.context = backend.info.name, backend.context
        self.backend = backend
        self.runner = runner
        self._calibration = calibration
        self.last: Outcome | None = None
        """Outcome of the last answer, with its draws."""
        self.timings = Timings()
        """Timings of the last answer or comparison."""

    def ask(self, question: str, turn: Turn, cancelled: Callable[[], bool]) -> Iterator[AnswerEvent]:
        """Answers a question and adds both to the conversation, even if the answer was cut off.

        Raises:
            ContextFullError: the conversation does not fit; nothing has changed.
            CancelledError: stopped before the answer began; nothing has changed.
            UsageError: the model's template refuses the conversation.
        """
        asked = self._question(question, turn, cancelled)
        for text in without_effect(turn.plan, self.backend.info):
            self.warn(text)
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
        """Returns the confidence of the last answer; None without a last answer or confidence."""
        if self.last is None or self.last_turn is None:
            return None
        turn = self.last_turn
        subject = subject_of(self.backend.info.name, turn.method, turn.plan)
        return confidence_of(self.last, subject, self._calibration)

    def compare(self, turn: Turn, cancelled: Callable[[], bool]) -> Iterator[Event]:
        """Answers the last question twice with the same draws: sample 0 without EM, sample 1 with it.

        The conversation does not change. If EM is off, sample 1 uses the default EM settings.
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

    def drop_last(self) -> None:
        super().drop_last()
        self.last = None

    def summary(self) -> str:
        last, turn = self._answered()
        em = turn.plan.params.em is not None
        context, sure = self.backend.context, self.confidence()
        return rendering.stats_line(last, turn.plan.seed, context, em=em, confidence=sure)

    def details(self) -> list[str]:
        sure = self.confidence()
        if self.last is None or sure is None:
            return []
        return [rendering.scores_text(scores_of(self.last.completion)), rendering.confidence_text(sure)]

    def shown(self) -> list[Shown]:
        return [self._shown(draw) for draw in self.last.completion.draws] if self.last is not None else []

    def _shown(self, draw: Draw) -> Shown:
        changed = draw.token != draw.token_without_em
        return Shown(
            self._text(draw.token),
            draw.entropy_before,
            draw.entropy_after,
            draw.p_before,
            draw.p_after,
            draw.steps > 0,
            changed,
            self._text(draw.token_without_em) if changed else None,
        )

    def _text(self, token: int) -> str:
        return self.backend.token_bytes(token).decode(errors="replace")

    def check_whole(self, *, quiet: bool) -> None:
        last, turn = self._answered()
        rendering.check_whole([last.completion], turn.plan.constraint, self.backend.context, quiet=quiet)

    def _answered(self) -> tuple[Outcome, Turn]:
        assert self.last is not None
        assert self.last_turn is not None
        return self.last, self.last_turn

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
            tokens = prompt_tokens(self.backend, asked, cancelled, self.warn)
        except ContextFullError as error:
            raise ContextFullError(error.message, _ROOM) from None
        if len(tokens) >= self.backend.context:
            raise ContextFullError(
                f"the conversation has {len(tokens):,} tokens with this message;"
                f" the context holds {self.backend.context:,}",
                _ROOM,
            )
        return tokens
