"""Thoughts before an answer: where they begin and end in a stream of tokens.

Models that think write their thoughts first, between marks that their chat template knows: mostly <think> and
</think>. `form_of` finds the marks of a template, `Splitter` splits a stream of bytes at them.

A thought comes before the answer, once. If the prompt opens it already (Qwen3.5, R1), the stream has only its
end. Marks that are control tokens have no bytes of their own; here they are spelled out.

Sources: the chat templates that come with llama.cpp; OpenAI's harmony format for gpt-oss.
"""

import codecs
import re
from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from emlocal.backends.base import Backend
from emlocal.sampling import SamplingParams

_CONTROL = re.compile(r"<[^<>\s]+>|\[/?[A-Z]+\]")  # how control tokens are written in marks
_TAIL = 16  # tokens of a prompt that may hold an opening mark


@dataclass(frozen=True)
class Form:
    """The marks around a thought."""

    begins: str
    ends: str
    closing: str
    """The text that is written to end a thought that is long enough."""
    before_end: str = ""
    """What a model writes before `ends` that is not part of the thought."""


FORMS = (
    Form("<think>", "</think>", "\n</think>\n\n"),
    Form("[THINK]", "[/THINK]", "[/THINK]"),
    Form(
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|end|><|start|>assistant",
    ),
    Form("<|channel>thought\n", "<channel|>", "\n<channel|>"),
    Form("<seed:think>", "</seed:think>", "\n</seed:think>\n"),
    Form("<mm:think>", "</mm:think>", "\n</mm:think>\n\n"),
)
"""The forms of Qwen3, R1, SmolLM3 and most others; Mistral's reasoning models; gpt-oss; Gemma 4; others.

The last two are those of Seed-OSS and MiniMax-M3.
"""


def form_of(template: str) -> Form | None:
    """Returns the marks of a model with this chat template; None if it has no thoughts."""
    return next((form for form in FORMS if form.ends in template), None)


def opens(form: Form, prompt: str) -> bool:
    """Returns whether a prompt ends with the opening of a thought; white space may follow."""
    return prompt.rstrip().endswith(form.begins.rstrip())


@dataclass(frozen=True)
class Reasoning:
    """How the thoughts of a sample are drawn."""

    budget: int | None = None
    """After this many tokens of a thought its end is written; None: the model ends it."""
    params: SamplingParams | None = None
    """How tokens of the thought are drawn; None: as the answer's."""


@dataclass(frozen=True)
class Marks:
    """A form in the tokens of one model."""

    form: Form
    spelled: Mapping[int, bytes]
    """The control tokens that occur in the marks, and their text."""
    closing: tuple[int, ...]
    """The tokens of `form.closing`."""
    opening: int | None
    """The one token that is `form.begins`; None if it takes several."""
    ends: Set[int]
    """The model's end tokens."""

    @classmethod
    def of(cls, backend: Backend) -> "Marks | None":
        """Returns the marks that the model's chat template knows; None if it knows no thoughts."""
        template = backend.info.chat_template
        form = None if template is None else form_of(template)
        if form is None:
            return None

        def tokens(text: str) -> list[int]:
            return backend.encode(text, add_special=False, parse_special=True)

        spelled: dict[int, bytes] = {}
        for name in _CONTROL.findall(form.begins + form.before_end + form.ends):
            alone = tokens(name)
            if len(alone) == 1 and not backend.token_bytes(alone[0]):
                spelled[alone[0]] = name.encode()
        begins = tokens(form.begins)
        opening = begins[0] if len(begins) == 1 else None
        return cls(form, spelled, tuple(tokens(form.closing)), opening, backend.info.end_tokens)

    def inside(self, prompt: Sequence[int], backend: Backend) -> bool:
        """Returns whether a prompt ends within a thought."""
        tail = (self.spelled.get(token, backend.token_bytes(token)) for token in prompt[-_TAIL:])
        return opens(self.form, b"".join(tail).decode(errors="replace"))


Part = Literal["before", "thought", "answer"]


class Splitter:
    """Splits a stream of bytes into a thought and the answer after it.

    White space before the opening mark and around the closing one belongs to neither.
    """

    def __init__(self, form: Form, *, inside: bool = False) -> None:
        self.part: Part = "thought" if inside else "before"
        self._begins, self._ends = form.begins.encode(), form.ends.encode()
        self._before_end = form.before_end.encode()
        self._held = b""
        self._answered = False  # the answer's first visible character has come
        self._first = True  # nothing of the thought has been returned

    @property
    def certain(self) -> bool:
        """Whether all bytes so far are known to be the thought's or the answer's."""
        return not self._held

    def push(self, piece: bytes) -> tuple[bytes, bytes]:
        """Adds bytes, and returns those that are now certain: of the thought, and of the answer."""
        if self.part == "answer":
            return b"", self._answer(piece)
        self._held += piece
        if self.part == "before" and not self._begun():
            return b"", self._release()
        if self.part == "thought":
            return self._of_thought()
        return b"", self._release()

    def finish(self) -> tuple[bytes, bytes]:
        """Returns the rest, at the end of the stream; held-back bytes belong to the current part."""
        held, self._held = self._held, b""
        return (self._shown(held.rstrip()), b"") if self.part == "thought" else (b"", self._answer(held))

    def _begun(self) -> bool:
        """Returns whether the stream has opened a thought; if it cannot, `part` becomes "answer"."""
        said = self._held.lstrip()
        if said.startswith(self._begins):
            self.part, self._held = "thought", said[len(self._begins) :]
        elif said.startswith(self._ends):  # no thought at all
            self.part, self._held = "answer", said[len(self._ends) :]
        elif not (self._begins.startswith(said) or self._ends.startswith(said)):
            self.part, self._answered = "answer", True  # as it was written
        return self.part == "thought"

    def _release(self) -> bytes:
        if self.part != "answer":
            return b""
        held, self._held = self._held, b""
        return self._answer(held)

    def _of_thought(self) -> tuple[bytes, bytes]:
        place = self._held.find(self._ends)
        if place >= 0:
            thought, rest = self._held[:place], self._held[place + len(self._ends) :]
            self.part, self._held = "answer", b""
            return self._shown(thought.rstrip().removesuffix(self._before_end).rstrip()), self._answer(rest)
        keep = _held_back(self._held, self._ends, self._before_end)
        thought, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return self._shown(thought), b""

    def _shown(self, thought: bytes) -> bytes:
        if self._first:
            thought = thought.lstrip()
            self._first = not thought
        return thought

    def _answer(self, piece: bytes) -> bytes:
        if not self._answered:
            piece = piece.lstrip()
            self._answered = bool(piece)
        return piece


def _held_back(text: bytes, ends: bytes, before: bytes) -> int:
    """Returns the length of a thought's end that may turn out not to be part of it.

    That is white space, then the beginning of the closing mark or of what stands before it.
    """
    keep = max(_overlap(text, mark) for mark in (ends, before + ends))
    return len(text) - len(text[: len(text) - keep].rstrip())


def _overlap(text: bytes, mark: bytes) -> int:
    """Returns the length of the longest end of `text` that begins `mark` and is not all of it."""
    sizes = range(min(len(text), len(mark) - 1), 0, -1)
    return next((size for size in sizes if mark.startswith(text[-size:])), 0)


class Thoughts:
    """The thoughts of one sample: its tokens so far, parted."""

    def __init__(self, marks: Marks, reasoning: Reasoning, *, inside: bool) -> None:
        self.tokens = 0
        """Tokens of the thought, its marks included."""
        self.params = reasoning.params
        self._marks, self._budget = marks, reasoning.budget
        self._splitter = Splitter(marks.form, inside=inside)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._taken = 0
        self._closing = deque(marks.closing)

    @property
    def part(self) -> Part:
        """Where the next token belongs."""
        return self._splitter.part

    @property
    def certain(self) -> bool:
        """Whether nothing is held back."""
        return self._splitter.certain

    @property
    def opening(self) -> int | None:
        """The token that begins a thought, if one may begin here."""
        return self._marks.opening if self.part == "before" else None

    @property
    def ends(self) -> Set[int]:
        """The tokens that would end the text within a thought."""
        return self._marks.ends

    @property
    def forced(self) -> int | None:
        """The next token of the closing mark, once the budget is spent."""
        begun = 0 < len(self._closing) < len(self._marks.closing)
        spent = self.part == "thought" and self._budget is not None and self.tokens >= self._budget
        return self._closing[0] if begun or (spent and self._closing) else None

    def push(self, token: int, piece: bytes) -> tuple[str, bytes]:
        """Adds a token. Returns what is certain now: text of the thought, bytes of the answer."""
        forced = self.forced
        if self.part != "answer":
            piece = self._marks.spelled.get(token, piece)
        self._taken += 1
        thinking = self.part == "thought"
        thought, answer = self._splitter.push(piece)
        if token == forced:
            self._closing.popleft()
        if thinking or self.part == "thought" or token == forced:
            self.tokens = self._taken
        return self._decoder.decode(thought), answer

    def answer_begins(self) -> None:
        """Notes that no thought comes: the next token is the answer's."""
        self._splitter.part = "answer"

    def finish(self) -> tuple[str, bytes]:
        """Returns the rest of both, at the end of the sample."""
        thought, answer = self._splitter.finish()
        return self._decoder.decode(thought, final=True), answer
