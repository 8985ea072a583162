"""A conversation with a model on a server: emlocal's own, or any that speaks OpenAI's API."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from emlocal import console, rendering
from emlocal.batch.lines import Item
from emlocal.chat.conversation import Conversation
from emlocal.chat.talk import AnswerEvent, Piece, Shown, Talk, Turn
from emlocal.em.scores import Scores
from emlocal.errors import CancelledError, EmlocalError
from emlocal.generation import Timings
from emlocal.generation.dialogue import Warn
from emlocal.generation.prompt import unheard
from emlocal.generation.sample import EntropySummary
from emlocal.methods.confidence import Confidence
from emlocal.remote.batch import Remote, request_of
from emlocal.remote.client import Client, ServerError
from emlocal.text import counted


@dataclass
class Reply:
    """What a server has sent of one answer."""

    text: str = ""
    tokens: list[Shown] = field(default_factory=list)
    """Tokens with their entropies; only emlocal's server sends them."""
    finish_reason: str | None = None
    usage: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    """emlocal's own fields."""
    first: float | None = None
    """Seconds from the request to the first text."""
    seconds: float = 0.0
    """Seconds from the request to the end."""
    pieces: int = 0

    def take(self, value: Mapping[str, Any]) -> Piece | None:
        """Takes in an event of the stream, or a whole answer; returns the text that it adds."""
        if isinstance(value.get("usage"), dict):
            self.usage = value["usage"]
        if isinstance(value.get("emlocal"), dict):
            self.own = value["emlocal"]
        choices = value.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return None
        choice = choices[0]
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        said = choice.get("delta") or choice.get("message")
        said = said if isinstance(said, dict) else {}
        tokens = _tokens(choice.get("logprobs"))
        self.tokens += tokens
        text, thought = said.get("content") or "", said.get("reasoning_content") or ""
        self.text += text
        self.pieces += bool(text or thought)
        return Piece(text, tokens[0].entropy_before if tokens else 0.0, thought) if text or thought else None

    @property
    def prompt_tokens(self) -> int:
        return _number(self.usage, "prompt_tokens")

    @property
    def generated_tokens(self) -> int:
        """Tokens of the answer, as the server counts them; else the pieces in which they came."""
        return _number(self.usage, "completion_tokens") or self.pieces

    @property
    def answer_tokens(self) -> int:
        """Tokens of this answer alone, if the server tells: a method that chooses has written others, too."""
        scores = self.own.get("scores")
        return (_number(scores, "tokens") if isinstance(scores, dict) else 0) or self.generated_tokens

    @property
    def timings(self) -> Timings:
        """Tokens and seconds, as they look from here."""
        details = self.usage.get("prompt_tokens_details")
        cached = _number(details, "cached_tokens") if isinstance(details, dict) else 0
        at_once = self.pieces < 2  # as methods send it that choose; then nothing tells reading from writing
        first = 0.0 if self.first is None or at_once else self.first
        return Timings(self.prompt_tokens, cached, first, self.generated_tokens, self.seconds - first)


class ConnectedSession(Talk):
    """A conversation with a model on a server."""

    def __init__(
        self,
        client: Client,
        name: str,
        remote: Callable[[Turn], Remote],
        context: int | None = None,
        conversation: Conversation | None = None,
        warn: Warn = unheard,
    ) -> None:
        """Starts a chat.

        Args:
            client: the server.
            name: the model's name there.
            remote: returns what the requests of a turn have in common; raises UsageError for settings that
                the server does not know.
            context: the most tokens of the conversation, if the server tells.
            conversation: one to continue.
            warn: takes a text for people.
        """
        super().__init__(conversation, warn)
        self.name, self.context = name, context
        self._client = client
        self._remote = remote
        self._last = Reply()

    def ask(self, question: str, turn: Turn, cancelled: Callable[[], bool]) -> Iterator[AnswerEvent]:
        path, body = self._request(question, turn)
        reply, started = Reply(), time.perf_counter()
        for value in self._client.stream(path, body, cancelled):
            piece = reply.take(value)
            if piece is not None:
                if reply.first is None:
                    reply.first = time.perf_counter() - started
                yield piece
        reply.seconds = time.perf_counter() - started
        if reply.finish_reason is None:
            if not cancelled():
                raise ServerError(0, f"the server at {self._client.url} ended in the middle of its answer")
            if not reply.text:
                raise CancelledError
            reply.finish_reason = "cancelled"
        self.conversation.exchanges.append((question, reply.text))
        self._last, self.last_turn = reply, turn
        self.context_used = reply.prompt_tokens + reply.generated_tokens
        self.totals.add(reply.timings)
        self._attempt = 0

    def _request(self, question: str, turn: Turn) -> tuple[str, dict[str, Any]]:
        """Returns the path and the body that ask for an answer. Another attempt has other draws."""
        remote = self._remote(turn)
        again = f", attempt {self._attempt + 1}" if self._attempt else ""
        key = f"turn {len(self.conversation.exchanges)}{again}"
        messages = tuple(self.conversation.messages(question))
        path, body = request_of(Item(1, key, messages, None), key, remote)
        if self._attempt and remote.kind == "openai" and "seed" in body:
            body["seed"] += self._attempt
        if remote.kind == "emlocal":
            body["logprobs"] = True  # the entropies come with them
        return path, {**body, "stream": True, "stream_options": {"include_usage": True}}

    def summary(self) -> str:
        reply, turn = self._last, self.last_turn
        assert turn is not None
        timings, sure = reply.timings, self._confidence()
        cached = f", {timings.cached_tokens} cached" if timings.cached_tokens else ""
        speed = rendering.rate(timings.generated_tokens, timings.generation_seconds)
        parts = [
            f"prompt {counted(timings.prompt_tokens, 'token')}{cached}" if reply.usage else "",
            f"answer {counted(timings.generated_tokens, 'token')}, {speed} tok/s",
            self._entropy_text(),
            self._ending(),
            self._vote_text(),
            rendering.confidence_text(sure) if rendering.says_enough(sure) else "",
            f"seed {reply.own.get('seed', turn.plan.seed)}",
        ]
        return " · ".join(filter(None, parts))

    def _entropy_text(self) -> str:
        found = self._last.own.get("entropy")
        if not isinstance(found, dict) or "mean_before" not in found:
            return ""
        entropy = EntropySummary(
            self._last.generated_tokens,
            found["mean_before"],
            found["mean_after"],
            found["touched"],
            found["changed"],
            found["mean_steps"],
        )
        return rendering.entropy_text(entropy, em=entropy.touched > 0)

    def _ending(self) -> str:
        if self._last.finish_reason == "length":
            count = counted(self._last.answer_tokens, "token")
            return f"cut off after {count} (set a larger --max-tokens)"
        return {"stop": "finished", "cancelled": "stopped by Ctrl-C"}.get(
            self._last.finish_reason or "", str(self._last.finish_reason)
        )

    def _vote_text(self) -> str:
        votes, drawn = self._last.own.get("votes"), self._last.own.get("drawn")
        if votes is None or drawn is None:
            return ""
        return f"{votes} of {drawn} agree" if votes else f"none of {drawn} has an answer to vote on"

    def _confidence(self) -> Confidence | None:
        own = self._last.own
        if own.get("confidence") is None:
            return None
        return Confidence(own["confidence"], str(own.get("confidence_from")), bool(own.get("calibrated")))

    def details(self) -> list[str]:
        scores, sure = self._last.own.get("scores"), self._confidence()
        lines = []
        if isinstance(scores, dict) and scores.keys() == {each.name for each in fields(Scores)}:
            lines.append(rendering.scores_text(Scores(**scores)))
        return lines if sure is None else [*lines, rendering.confidence_text(sure)]

    def shown(self) -> list[Shown]:
        return self._last.tokens

    def check_whole(self, *, quiet: bool) -> None:
        assert self.last_turn is not None
        constraint = self.last_turn.plan.constraint
        if self._last.finish_reason == "length" and constraint is not None:
            raise EmlocalError(
                f"the answer does not match {constraint.what}: it is {self._ending()}",
                "set a larger --max-tokens",
            )
        if self._last.finish_reason == "length" and quiet:
            console.warn(f"the answer is {self._ending()}")


def _tokens(logprobs: Any) -> list[Shown]:
    """Returns the tokens of a chunk with their entropies; none if the server does not send these."""
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    found = []
    for entry in entries or ():
        own = entry.get("emlocal") if isinstance(entry, dict) else None
        if not isinstance(own, dict):
            return []
        found.append(
            Shown(
                entry["token"],
                own["entropy_before"],
                own["entropy_after"],
                math.exp(entry["logprob"]),
                math.exp(own["logprob_after"]),
                own["steps"] > 0,
                bool(own["changed"]),
                None,
            )
        )
    return found


def _number(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) else 0
