"""The form of chat and text completions, whole and as the events of a stream."""

import json
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from emlocal.batch.lines import ENDINGS, AnsweredLine, beside, choice, own_row
from emlocal.batch.run import answered_line, tool_names
from emlocal.generation import Completion
from emlocal.serve.engine_loop import Done, Drawn, Said
from emlocal.serve.protocol import Asked

Object = dict[str, Any]
_BANNED = -9999.0
"""Stands for the logarithm of 0, which JSON lacks; it is OpenAI's own number."""


class Shape(Protocol):
    """The form in which one endpoint answers."""

    asked: Asked

    def whole(self, done: Done) -> Object:
        """Returns the answer in one object."""

    def opening(self) -> Iterator[bytes]:
        """Yields the first events of a stream."""

    def said(self, said: Sequence[Said]) -> Iterator[bytes]:
        """Yields the events of some tokens, in their order."""

    def ending(self, done: Done) -> Iterator[bytes]:
        """Yields the last events. If the method chooses, they have the whole text."""


@dataclass(frozen=True)
class Answer:
    """The contents of an answer in any form."""

    line: AnsweredLine
    which: Sequence[int]
    """Numbers of the completions that are choices."""
    choices: Sequence[Completion]
    drawn: Sequence[Sequence[Drawn]]
    """Tokens of each choice; empty if the request does not ask for them."""
    texts: Sequence[str | None]
    """Text of each choice; None: withheld."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    own: Object
    """emlocal's own fields."""


def answer_of(asked: Asked, done: Done, key: str) -> Answer:
    """Returns the choices of an outcome: the chosen completion, or all if the method does not choose."""
    outcome, house = done.outcome, asked.house
    plan = asked.plan
    tools = tool_names(asked.item)
    line = answered_line(key, "", house.name, plan, outcome, asked.settings, {}, tools)
    row = own_row(line)
    own = beside(line, row)
    one = asked.settings.method.collecting.collects
    which = [outcome.index] if one else [*range(len(outcome.completions))]
    for name in ("entropies", "rounds"):
        if name in row:
            own[name] = row[name]
    if "samples" in row:
        kept = row["samples"]
        own["samples"] = kept if one else [{k: v for k, v in each.items() if k != "text"} for each in kept]
    withheld = outcome.index if line.abstained else None
    return Answer(
        line,
        which,
        [outcome.completions[i] for i in which],
        [done.drawn[i] for i in which] if done.drawn else [],
        [None if i == withheld else outcome.completions[i].text for i in which],
        row["prompt_tokens"],
        row["cached_tokens"],
        row["completion_tokens"],
        sum(each.reasoning_tokens for each in outcome.completions),
        own,
    )


def usage_of(answer: Answer) -> Object:
    """Returns the usage as OpenAI's API has it."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
    }


def event(value: Object, name: str | None = None) -> bytes:
    """Returns one event of a stream."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def log_p(value: float) -> float:
    """Returns a log-probability for JSON, in nats with six decimals."""
    return round(value, 6) if math.isfinite(value) else _BANNED


def token_entry(drawn: Drawn) -> Object:
    """Returns a token with its log-probability before EM, its alternatives, and the effect of EM."""
    draw = drawn.draw
    return {
        **_spelt(drawn.piece, math.log(draw.p_before) if draw.p_before > 0 else -math.inf),
        "top_logprobs": [
            {
                **_spelt(piece, each.log_p_before),
                "emlocal": {"token_id": each.token, "logprob_after": log_p(each.log_p_after)},
            }
            for piece, each in drawn.alternatives
        ],
        "emlocal": {
            "token_id": draw.token,
            "entropy_before": round(draw.entropy_before, 6),
            "entropy_after": round(draw.entropy_after, 6),
            "steps": draw.steps,
            "logprob_after": log_p(math.log(draw.p_after) if draw.p_after > 0 else -math.inf),
            "changed": draw.token != draw.token_without_em,
        },
    }


def _spelt(piece: bytes, value: float) -> Object:
    return {"token": piece.decode(errors="replace"), "bytes": [*piece], "logprob": log_p(value)}


@dataclass
class Completions:
    """The form of `/v1/chat/completions`."""

    asked: Asked
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    object = "chat.completion"
    object_of_chunk = "chat.completion.chunk"

    # ------------------------------------------------------------------------------------------ its parts

    def choice(self, answer: Answer, index: int) -> Object:
        """Returns a choice of a whole answer, without its number."""
        return choice(answer.line, answer.which[index], answer.texts[index] is None)

    def piece(self, text: str, reasoning: str = "") -> Object:
        """Returns a piece of the text for a chunk's choice."""
        thought = {"reasoning_content": reasoning} if reasoning else {}
        return {"delta": {**thought, **({"content": text} if text else {})}}

    def at_once(self, answer: Answer, index: int) -> Object:
        """Returns the whole text for a chunk's choice."""
        message = self.choice(answer, index)["message"]
        delta = {name: value for name, value in message.items() if name != "role" and value}
        calls = [{"index": i, **call} for i, call in enumerate(delta.pop("tool_calls", ()))]
        return {"delta": {**delta, **({"tool_calls": calls} if calls else {})}}

    def logprobs(self, drawn: Sequence[Drawn]) -> Object:
        """Returns the log-probabilities of a choice or of a chunk."""
        return {"content": [token_entry(each) for each in drawn], "refusal": None}

    def first(self) -> Object:
        """Returns the content of a choice's first chunk."""
        return {"delta": {"role": "assistant", "content": ""}}

    # ------------------------------------------------------------------------------------------ the shape

    def whole(self, done: Done) -> Object:
        answer = answer_of(self.asked, done, self.id)
        choices = [
            {
                **self.choice(answer, i),
                "index": i,
                "logprobs": self.logprobs(answer.drawn[i]) if answer.drawn else None,
            }
            for i in range(len(answer.choices))
        ]
        return {**self._head(self.object, choices), "usage": usage_of(answer), "emlocal": answer.own}

    def opening(self) -> Iterator[bytes]:
        n = 1 if self.asked.chooses else self.asked.plan.samples
        if first := self.first():
            yield from (self._chunk(i, first) for i in range(n))

    def said(self, said: Sequence[Said]) -> Iterator[bytes]:
        for sample in dict.fromkeys(each.sample for each in said):
            own = [each for each in said if each.sample == sample]
            text, reasoning = "".join(each.text for each in own), "".join(each.reasoning for each in own)
            drawn = [each.drawn for each in own if each.drawn is not None]
            if text or reasoning or drawn:
                yield self._chunk(sample, self.piece(text, reasoning), drawn)

    def ending(self, done: Done) -> Iterator[bytes]:
        answer = answer_of(self.asked, done, self.id)
        if self.asked.chooses:
            for i in range(len(answer.choices)):
                yield self._chunk(i, self.at_once(answer, i), answer.drawn[i] if answer.drawn else ())
        last = len(answer.choices) - 1
        for i in range(len(answer.choices)):
            reason = self.choice(answer, i)["finish_reason"]
            yield self._chunk(i, self.piece(""), (), reason, {"emlocal": answer.own} if i == last else {})
        if self.asked.usage:
            yield event({**self._head(self.object_of_chunk, []), "usage": usage_of(answer)})
        yield b"data: [DONE]\n\n"

    def _chunk(
        self,
        index: int,
        part: Object,
        drawn: Sequence[Drawn] = (),
        reason: str | None = None,
        own: Object | None = None,
    ) -> bytes:
        logprobs = self.logprobs(drawn) if drawn else None
        one = {"index": index, **part, "finish_reason": reason, "logprobs": logprobs}
        usage = {"usage": None} if self.asked.usage else {}
        return event({**self._head(self.object_of_chunk, [one]), **usage, **(own or {})})

    def _head(self, kind: str, choices: Sequence[Object]) -> Object:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": self.asked.house.fingerprint,
            "choices": choices,
        }


@dataclass
class TextCompletions(Completions):
    """The form of `/v1/completions`."""

    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    object = object_of_chunk = "text_completion"

    def choice(self, answer: Answer, index: int) -> Object:
        reason = ENDINGS[answer.choices[index].finish_reason]
        return {"text": answer.texts[index] or "", "finish_reason": reason}

    def piece(self, text: str, reasoning: str = "") -> Object:
        return {"text": reasoning + text}

    def at_once(self, answer: Answer, index: int) -> Object:
        return self.piece(answer.texts[index] or "")

    def first(self) -> Object:
        return {}

    def logprobs(self, drawn: Sequence[Drawn]) -> Object:
        entries = [token_entry(each) for each in drawn]
        offsets, at = [], 0
        for entry in entries:
            offsets.append(at)
            at += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {each["token"]: each["logprob"] for each in entry["top_logprobs"]} for entry in entries
            ],
            "text_offset": offsets,
            "emlocal": [entry["emlocal"] for entry in entries],
        }
