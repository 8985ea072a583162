"""One sample on its way: what is asked of it, its text as it becomes certain, and what came of it."""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from emlocal.backends.base import Backend, Row
from emlocal.sampling import Draw, SamplingParams, Uniforms

FinishReason = Literal["stop", "length", "context", "cancelled", "pause"]
"""An end token or stop string; --max-tokens; the context is full; Ctrl-C; its request's pause: never of an
answer, which goes on."""


@dataclass(frozen=True)
class Request:
    """One sample to be drawn from a prompt."""

    params: SamplingParams
    uniforms: Uniforms
    max_tokens: int
    stop: tuple[str, ...] = ()
    pause: Callable[[str, int], bool] | None = None
    """Whether to end here, for another job to go on: of the sample's text so far and how many tokens that is.
    Asked only where the text is certain: between characters, and not within what may be a stop string."""


@dataclass
class Completion:
    """One finished sample."""

    sample: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    """Without the end token."""
    draws: list[Draw] = field(default_factory=list)
    """One a token, the end token's included."""
    ends: list[int] = field(default_factory=list)
    """Characters decoded with each token of `tokens`: token i wrote those from `ends[i - 1]` on. A character
    of several tokens is its last one's; a stop string is not in `text`, but is counted here."""
    finish_reason: FinishReason = "length"
    stop: str | None = None
    """The stop string that ended it, if one did."""
    tail: str = ""
    """The end of `text` that was held back until now and came with no Token."""


def joined(parts: Sequence[Completion], sample: int = 0) -> Completion:
    """One answer of parts that were drawn one after the other, each `after` those before it.

    Args:
        parts: at least one; all but the last ended by their request's pause.
        sample: the number that the answer gets.
    """
    ends: list[int] = []
    before = 0
    for part in parts:
        ends += [before + end for end in part.ends]
        before += len(part.text)
    last = parts[-1]
    return Completion(
        sample,
        "".join(part.text for part in parts),
        [token for part in parts for token in part.tokens],
        [draw for part in parts for draw in part.draws],
        ends,
        last.finish_reason,
        last.stop,
        last.tail,
    )


@dataclass(frozen=True)
class EntropySummary:
    """What EM did to an answer, over its tokens."""

    tokens: int
    before: float
    """Mean entropy before EM, nats."""
    after: float
    touched: float
    """Share of tokens at which EM took a step."""
    changed: float
    """Share of tokens that the same draw would have made another token without EM."""
    steps: float
    """Mean EM steps a token."""

    def as_json(self) -> dict[str, float]:
        """For output files; nats and shares to six places."""
        return {
            "mean_before": round(self.before, 6),
            "mean_after": round(self.after, 6),
            "touched": round(self.touched, 6),
            "changed": round(self.changed, 6),
            "mean_steps": round(self.steps, 6),
        }


def summarize(draws: Sequence[Draw]) -> EntropySummary:
    """The summary of one or more answers' draws."""
    n = max(1, len(draws))
    return EntropySummary(
        len(draws),
        sum(d.entropy_before for d in draws) / n,
        sum(d.entropy_after for d in draws) / n,
        sum(d.steps > 0 for d in draws) / n,
        sum(d.token != d.token_without_em for d in draws) / n,
        sum(d.steps for d in draws) / n,
    )


class TextStream:
    """Assembles one answer.

    `push` returns the text that is now certain: characters whose bytes are all there, less a tail that may
    yet turn out to be the beginning of a stop string.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self.stopped_by: str | None = None
        """The stop string that ended the answer; what follows it is dropped, and so is it."""
        self._stop = stop
        self.decoded = 0
        """Characters so far, held back or not."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    @property
    def certain(self) -> bool:
        """Whether all that was pushed has been returned: no half character, nothing held back."""
        return not (self._held or self._decoder.getstate()[0])

    def push(self, piece: bytes) -> str:
        """Add a token's bytes."""
        text = self._decoder.decode(piece)
        self.decoded += len(text)
        return self._release(text)

    def finish(self) -> str:
        """The rest, at the end of the answer; an incomplete character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped_by is not None:
            return ""
        if not self._stop:
            return new
        text = self._held + new
        # the one complete first, however the text came in pieces; of two that end together, the longer
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            _, start, self.stopped_by = min(found)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


class Sample:
    """Takes drawn tokens in, until it is done."""

    def __init__(self, index: int, request: Request, prompt: Sequence[int]) -> None:
        self.request = request
        self.completion = Completion(index)
        self.done = False
        self._text = TextStream(request.stop)
        # kept only where penalties look at it
        self._seen = list(prompt) if request.params.penalizes else []

    def row(self, sequence: int) -> Row:
        """What to draw next, from the given sequence's logits."""
        u = self.request.uniforms[len(self.completion.draws)]
        return Row(sequence, self.request.params, u, self._seen)

    def accept(self, draw: Draw, backend: Backend) -> str:
        """Take a drawn token in; `done` says whether it was the last. Returns the text that is certain now:
        maybe none, maybe more than the token's own."""
        completion = self.completion
        completion.draws.append(draw)
        if draw.token in backend.info.end_tokens:
            self.end("stop")
            return ""
        completion.tokens.append(draw.token)
        if self.request.params.penalizes:
            self._seen.append(draw.token)
        text = self._text.push(backend.token_bytes(draw.token))
        completion.ends.append(self._text.decoded)
        completion.text += text
        if self._text.stopped_by is not None:
            completion.stop = self._text.stopped_by
            self.end("stop")
        elif len(completion.tokens) >= self.request.max_tokens:
            self.end("length")
        elif self._pauses():
            self.end("pause")
        return text

    def _pauses(self) -> bool:
        pause = self.request.pause
        if pause is None or not self._text.certain:
            return False
        return pause(self.completion.text, len(self.completion.tokens))

    def end(self, reason: FinishReason) -> None:
        """Close the sample; text that was held back comes with its Completion."""
        self.done = True
        self.completion.finish_reason = reason
        self.completion.tail = self._text.finish()
        self.completion.text += self.completion.tail
