"""One sample on its way: what is asked of it, what has been drawn, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from emlocal.backends.base import Backend, Row
from emlocal.generation.text import TextStream
from emlocal.sampling import Draw, SamplingParams, Uniforms

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""An end token or stop string; --max-tokens; the context is full; Ctrl-C."""


@dataclass(frozen=True)
class Request:
    """One sample to be drawn from a prompt."""

    params: SamplingParams
    uniforms: Uniforms
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass
class Completion:
    """One finished sample."""

    sample: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    """Without the end token."""
    draws: list[Draw] = field(default_factory=list)
    """One a token, the end token's included."""
    finish_reason: FinishReason = "length"
    stop: str | None = None
    """The stop string that ended it, if one did."""
    tail: str = ""
    """The end of `text` that was held back until now and came with no Token."""


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
        completion.text += text
        if self._text.stopped_by is not None:
            completion.stop = self._text.stopped_by
            self.end("stop")
        elif len(completion.tokens) >= self.request.max_tokens:
            self.end("length")
        return text

    def end(self, reason: FinishReason) -> None:
        """Close the sample; text that was held back comes with its Completion."""
        self.done = True
        self.completion.finish_reason = reason
        self.completion.tail = self._text.finish()
        self.completion.text += self.completion.tail
