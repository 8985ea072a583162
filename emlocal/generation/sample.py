"""One sample: its request, its text as it becomes certain, and its completion."""

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from emlocal.backends.base import Backend, Row
from emlocal.generation.alternatives import Alternative
from emlocal.generation.constraints import Matcher
from emlocal.generation.thinking import Reasoning, Thoughts
from emlocal.sampling import Draw, Mask, SamplingParams, Uniforms
from emlocal.settings.constraint import Constraint

FinishReason = Literal["stop", "length", "context", "cancelled", "pause"]
"""The reason why a sample ended.

- stop: an end token or stop string
- length: --max-tokens
- context: the context is full
- cancelled: Ctrl-C
- pause: its request's pause; never the reason of a whole answer, which continues
"""


@dataclass(frozen=True)
class Request:
    """One sample to draw from a prompt."""

    params: SamplingParams
    uniforms: Uniforms
    max_tokens: int
    stop: tuple[str, ...] = ()
    pause: Callable[[str, int], bool] | None = None
    """Decides, from the sample's text and number of tokens so far, whether it ends here.

    Another job can then continue. Called only when the text is certain: between characters, and not within
    a possible stop string.
    """
    constraint: Constraint | None = None
    """The form that the answer must match."""
    begun: tuple[int, ...] = ()
    """The answer's tokens that are in the prompt already; the later tokens must match together with them."""
    reasoning: Reasoning | None = None
    """How thoughts are drawn; None: the text is not parted, and thoughts are part of it."""
    top: int = 0
    """Number of alternatives to note for each token; each token then costs a look at its whole row."""


@dataclass
class Completion:
    """One finished sample."""

    sample: int
    text: str = ""
    """The answer, without the thoughts before it."""
    tokens: list[int] = field(default_factory=list)
    """Token ids, without the end token."""
    draws: list[Draw] = field(default_factory=list)
    """One draw per token, including the end token's."""
    ends: list[int] = field(default_factory=list)
    """Characters decoded with each token of `tokens`: token i wrote those from `ends[i - 1]` on.

    A character of several tokens counts for the last one. A stop string is not in `text`, but is counted
    here.
    """
    finish_reason: FinishReason = "length"
    stop: str | None = None
    """The stop string that ended it; None if none did."""
    tail: str = ""
    """The end of `text` that was held back until now and came with no Token."""
    complete: bool | None = None
    """Whether the answer is all that its constraint asks for; None without one. An answer that was cut off
    may not be."""
    reasoning: str = ""
    """The thoughts before the answer."""
    reasoning_tokens: int = 0
    """How many of `tokens`, from the first on, are thoughts and their marks."""
    alternatives: list[tuple[Alternative, ...]] = field(default_factory=list)
    """The alternatives of each draw, if the request asks for them; otherwise empty."""


def complete_json(completion: Completion) -> dict[str, bool]:
    """Returns the field "complete" for output; nothing without a constraint."""
    return {} if completion.complete is None else {"complete": completion.complete}


def reasoning_json(completion: Completion) -> dict[str, Any]:
    """For output: the thoughts, how long they are, entropies of thought and answer; nothing without them."""
    n = completion.reasoning_tokens
    if n == 0:
        return {}
    of_parts = {"reasoning": completion.draws[:n], "answer": completion.draws[n:]}
    return {
        "reasoning": completion.reasoning,
        "reasoning_tokens": n,
        "entropy_of": {name: summarize(draws).as_json() for name, draws in of_parts.items()},
    }


def joined(parts: Sequence[Completion], sample: int = 0) -> Completion:
    """Returns one answer from parts that were drawn one after the other, each `after` those before it.

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
        last.complete,
        "".join(part.reasoning for part in parts),
        sum(part.reasoning_tokens for part in parts),
        alternatives=[each for part in parts for each in part.alternatives],
    )


@dataclass(frozen=True)
class EntropySummary:
    """The effect of EM on an answer, over its tokens."""

    tokens: int
    before: float
    """Mean entropy before EM, nats."""
    after: float
    touched: float
    """Share of tokens at which EM took a step."""
    changed: float
    """Share of tokens that would have been another token without EM, by the same draw."""
    steps: float
    """Mean EM steps per token."""

    def as_json(self) -> dict[str, float]:
        """Returns the summary for output files; nats and shares to six decimal places."""
        return {
            "mean_before": round(self.before, 6),
            "mean_after": round(self.after, 6),
            "touched": round(self.touched, 6),
            "changed": round(self.changed, 6),
            "mean_steps": round(self.steps, 6),
        }


def summarize(draws: Sequence[Draw]) -> EntropySummary:
    """Returns the summary of one or more answers' draws."""
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
    """Assembles the text of one answer.

    `push` returns the text that is now certain: characters whose bytes are complete, without a tail that may
    be the beginning of a stop string.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self.stopped_by: str | None = None
        """The stop string that ended the answer; the answer's text ends before it."""
        self._stop = stop
        self.decoded = 0
        """Characters so far, held back or not."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    @property
    def certain(self) -> bool:
        """Whether everything that was pushed has been returned: no half character, nothing held back."""
        return not (self._held or self._decoder.getstate()[0])

    def push(self, piece: bytes) -> str:
        """Adds a token's bytes and returns the text that is now certain."""
        text = self._decoder.decode(piece)
        self.decoded += len(text)
        return self._release(text)

    def finish(self) -> str:
        """Returns the rest, at the end of the answer; an incomplete character becomes U+FFFD."""
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
        # the stop string that is complete first, however the text was split; of two that end together, the
        # longer
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            _, start, self.stopped_by = min(found)
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


def _allowing(legal: Mask, token: int) -> Mask:
    """A mask with one more token."""
    more = legal.copy()
    more[token // 8] |= 1 << token % 8
    return more


def _all_but(tokens: Iterable[int], like: Mask) -> Mask:
    """A mask of all tokens but these, of the size of another."""
    mask = np.full_like(like, 255)
    for token in tokens:
        mask[token // 8] &= 255 - (1 << token % 8)
    return mask


class Sample:
    """A sample that takes in drawn tokens until it is done."""

    def __init__(
        self,
        index: int,
        request: Request,
        prompt: Sequence[int],
        matcher: Matcher | None = None,
        thoughts: Thoughts | None = None,
    ) -> None:
        """Sets up the sample, which then owns `matcher` and `thoughts`.

        Both are in the state before the first token. `matcher` is None without a constraint, `thoughts` for a
        model that does not think. Raises ConstraintError if no token may come first.
        """
        self.request = request
        self.completion = Completion(index)
        self.done = False
        self._text = TextStream(request.stop)
        self._matcher = matcher
        self._before = matcher.copy() if matcher and request.stop else None
        self._thoughts = thoughts
        self._thought_before = 0 if thoughts is None else thoughts.tokens
        self.forced = self._forced()
        """The next token, where no other is legal."""
        # kept only where penalties look at it
        self._seen = list(prompt) if request.params.penalizes else []

    def row(self, sequence: int, back: int = 0) -> Row:
        """Returns the next row to draw from: the given sequence's, `back` tokens before its last."""
        u = self.request.uniforms[len(self.completion.draws)]
        params, thoughts = self.request.params, self._thoughts
        legal = None if self._matcher is None else self._matcher.legal()
        if thoughts is not None and thoughts.part == "thought":
            params = thoughts.params or params
            legal = None if legal is None else _all_but(thoughts.ends, legal)  # an answer must come
        elif thoughts is not None and legal is not None and thoughts.opening is not None:
            legal = _allowing(legal, thoughts.opening)
        return Row(sequence, params, u, self._seen, legal, back)

    def _forced(self) -> int | None:
        """The next token, if no other is legal. Raises ConstraintError."""
        thoughts = self._thoughts
        if thoughts is not None:
            forced = thoughts.forced
            if forced is not None or thoughts.part == "thought" or thoughts.opening is not None:
                return forced
        return None if self._matcher is None else self._matcher.forced()

    def accept(self, draw: Draw, backend: Backend) -> tuple[str, str]:
        """Take a drawn token in; `done` says whether it was the last. Returns the text that is certain now,
        of the answer and of the thought: maybe none, maybe more than the token's own.

        Returns the text that is now certain: maybe none, maybe more than the token's own. Raises
        ConstraintError if no token may come next.
        """
        completion = self.completion
        completion.draws.append(draw)
        if draw.token in backend.info.end_tokens:
            self.end("stop")
            return "", ""
        completion.tokens.append(draw.token)
        if self.request.params.penalizes:
            self._seen.append(draw.token)
        reasoning, piece = self._parted(draw.token, backend.token_bytes(draw.token))
        text = self._text.push(piece)
        completion.ends.append(self._text.decoded)
        completion.text += text
        if self._text.stopped_by is not None:
            completion.stop = self._text.stopped_by
            self.end("stop")
        elif self._matcher is not None and self._matcher.finished:
            self.end("stop")  # nothing may follow but an end token
        elif len(completion.tokens) >= self.request.max_tokens:
            self.end("length")
        elif self._pauses():
            self.end("pause")
        else:  # known before the pass that would compute the token's logits
            self.forced = self._forced()
        return text, reasoning

    def _parted(self, token: int, piece: bytes) -> tuple[str, bytes]:
        """What a token adds to the thought, and its bytes for the answer, whose constraint takes it."""
        thoughts, matcher = self._thoughts, self._matcher
        if thoughts is None:
            if matcher is not None:
                matcher.take(token)
            return "", piece
        if matcher is not None and thoughts.part == "before" and token != thoughts.opening:
            thoughts.answer_begins()
        if matcher is not None and thoughts.part == "answer" and thoughts.forced is None:
            matcher.take(token)
        reasoning, piece = thoughts.push(token, piece)
        self.completion.reasoning += reasoning
        self.completion.reasoning_tokens = thoughts.tokens - self._thought_before
        return reasoning, piece

    def _pauses(self) -> bool:
        pause = self.request.pause
        if pause is None or not self._text.certain or (self._thoughts and not self._thoughts.certain):
            return False
        return pause(self.completion.text, len(self.completion.tokens))

    def end(self, reason: FinishReason) -> None:
        """Ends the sample; the text that was held back comes with its Completion."""
        self.done = True
        self.completion.finish_reason = reason
        completion, matcher = self.completion, self._matcher
        rest = ""
        if self._thoughts is not None:
            reasoning, piece = self._thoughts.finish()
            completion.reasoning += reasoning
            rest = self._text.push(piece)
        completion.tail = rest + self._text.finish()
        completion.text += completion.tail
        if matcher is not None:
            before = (
                self._before if completion.stop is not None else None
            )  # the stop string is not in the text
            completion.complete = matcher.met if before is None else before.meets(completion.text)
