"""The contract of an engine: token ids in, token ids and their statistics out.

An engine knows nothing of text files, chat or JSON. It holds *sequences*: runs of tokens whose attention
state it keeps, so that a common prefix is computed once. All engines keep one contract and pass one test
suite (tests/backends/test_contract.py).

`Backend` is the contract. `Recomputing` is the shortest way to keep it (docs/extending.md begins with it).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from emlocal.backends.engine import LoadOptions as LoadOptions
from emlocal.backends.engine import context_length
from emlocal.errors import BackendError, CancelledError, ContextFullError, UsageError
from emlocal.sampling import Draw, Mask, Sampler, SamplingParams

if TYPE_CHECKING:
    from emlocal.models.header import ModelHeader


@dataclass(frozen=True)
class ModelInfo:
    """The facts that the model gives about itself."""

    name: str
    architecture: str
    vocabulary: int
    trained_context: int
    end_tokens: Set[int]
    """Every token that ends a generation."""
    chat_template: str | None = None
    tool_template: str | None = None
    """The one for conversations with tools, where the model has one of its own."""
    bos: str = ""
    eos: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """The authors' sampling settings, by SamplingParams field."""

    @classmethod
    def of_folder(cls, header: "ModelHeader", tokenizer: "Tokenizer", name: str = "") -> Self:
        """Returns the facts about a model in a Hugging Face folder. `name`: what people call it."""
        return cls(
            name=name or header.name,
            architecture=header.architecture,
            vocabulary=header.vocab_size,
            trained_context=header.context_length,
            end_tokens=tokenizer.end_tokens,
            chat_template=tokenizer.chat_template,
            tool_template=tokenizer.tool_template,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            sampling=header.sampling,
        )


class Feed(NamedTuple):
    """Tokens to append to a sequence."""

    sequence: int
    tokens: Sequence[int]
    wanted: int = 1
    """After how many of the last tokens the logits are needed; a feed without them (0) is cheaper.

    True is 1 and False is 0. Only an engine that `rewinds` gives more than one.
    """


class Row(NamedTuple):
    """A token to draw after a token just fed to `sequence`: the last one, unless `back` says otherwise."""

    sequence: int
    params: SamplingParams
    u: float
    """Uniform in [0, 1)."""
    seen: Sequence[int] = ()
    """Tokens so far, for the penalties."""
    legal: Mask | None = None
    """The tokens that may be drawn; None: all."""
    back: int = 0
    """Number of tokens that were fed after the one meant."""


def check_feeds(feeds: Sequence[Feed], vocabulary: int) -> None:
    """Raises ValueError for feeds that `Backend.forward` does not allow.

    These are no feeds at all, a feed without tokens, a sequence twice, more rows than tokens, or a token
    outside 0 … vocabulary - 1 (which would end a process on CUDA).
    """
    if not feeds or len({feed.sequence for feed in feeds}) < len(feeds):
        raise ValueError("a call must feed at least one sequence, and each only once")
    for feed in feeds:
        if not len(feed.tokens):
            raise ValueError(f"sequence {feed.sequence} is fed no tokens")
        if not 0 <= feed.wanted <= len(feed.tokens):
            raise ValueError(f"{feed.wanted} rows are wanted of a feed of {len(feed.tokens)}")
        low, high = min(feed.tokens), max(feed.tokens)
        if low < 0 or high >= vocabulary:
            raise ValueError(f"there is no token {low if low < 0 else high}; they are 0 to {vocabulary - 1}")


def check_length(held: int, more: int, context: int) -> None:
    """Raises ContextFullError if a sequence that holds `held` tokens has no room for `more`."""
    if held + more > context:
        raise ContextFullError(
            f"{more:,} more tokens cannot be added: the sequence holds {held:,} of {context:,}",
            "set a larger --context",
        )


def free_sequence(held: Container[int], most: int) -> int:
    """Returns the smallest number below `most` that is not held. Raises BackendError if all are."""
    for sequence in range(most):
        if sequence not in held:
            return sequence
    raise BackendError(f"all {most} sequences are in use")


class Backend(ABC):
    """A loaded model. Not for use from two threads at once."""

    name: ClassVar[str]
    info: ModelInfo
    context: int
    """The most tokens of a sequence; sequences that share their room hold no more in all."""
    max_sequences: int
    rewinds: bool = False
    """Whether a feed may want several rows, and `trim` then cuts off any of its tokens exactly.

    Only such an engine can verify guessed tokens (`generation/speculation.py`).
    """

    @abstractmethod
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Returns the token ids of a text.

        `add_special`: with the model's BOS and the like. `parse_special`: read "<|im_end|>" and its kind as
        the tokens that they name.
        """

    def least_tokens(self, text: str) -> int:
        """Returns a lower bound of the tokens of a text, without tokenizing it; 0 if nothing is certain."""
        return 0

    @abstractmethod
    def control_texts(self) -> Sequence[str]:
        """Returns the texts that `encode` reads as control tokens with `parse_special`."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Returns the UTF-8 bytes of a token, which may be a part of a character; none for control tokens."""

    @abstractmethod
    def open(self) -> int:
        """Returns a new, empty sequence. Raises BackendError if `max_sequences` are open."""

    @abstractmethod
    def release(self, sequence: int) -> None:
        """Releases a sequence and its memory."""

    @abstractmethod
    def length(self, sequence: int) -> int:
        """Returns the number of tokens that a sequence holds."""

    @abstractmethod
    def fork(self, sequence: int) -> int:
        """Returns a new sequence with the same tokens, sharing their memory if the engine can."""

    @abstractmethod
    def trim(self, sequence: int, length: int) -> int:
        """Removes all but the first `length` tokens of a sequence, and returns how many it kept.

        It keeps fewer if the engine cannot cut there (recurrent models keep 0).
        """

    @abstractmethod
    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        """Appends tokens to sequences: prompts of any length and single steps in one call.

        Afterwards, until the next call, `sample` and `logits` know the rows that each feed wanted.

        Raises:
            ValueError: see `check_feeds`.
            ContextFullError: the tokens do not fit beside those held.
            CancelledError: `cancelled()` became true; nothing was appended.

        After an error the sequences are as before the call, or empty if the engine cannot go back.
        """

    @abstractmethod
    def sample(self, rows: Sequence[Row]) -> list[Draw]:
        """Draws a token for each row. There may be no rows, and several rows may name one sequence."""

    @abstractmethod
    def logits(self, sequence: int, back: int = 0) -> NDArray[np.float32]:
        """Returns a copy of the raw logits after a token just fed, float32 [V].

        `back`: number of tokens that were fed after that one. Raises KeyError for a row that was not wanted.
        """

    @abstractmethod
    def describe(self) -> str:
        """Returns how the model runs, for people: "context 8,192 tokens, 4 threads"."""

    @property
    @abstractmethod
    def arithmetic(self) -> str:
        """Device and number format of the engine's sums: "cpu, bfloat16".

        If they differ, the last bits differ, and therefore answers can differ.
        """

    @abstractmethod
    def memory_bytes(self) -> int:
        """Returns the bytes of model, sequences' states and buffers, as far as the engine knows."""

    @abstractmethod
    def close(self) -> None:
        """Frees the model. No other method may be called afterwards."""


class Tokenizer(Protocol):
    """The tokenizer that an engine needs; `emlocal.models.tokenizer.Tokenizer` is one."""

    @property
    def end_tokens(self) -> Set[int]: ...
    @property
    def bos(self) -> str: ...
    @property
    def eos(self) -> str: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def tool_template(self) -> str | None: ...
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...
    def least_tokens(self, text: str) -> int: ...
    def control_texts(self) -> Sequence[str]: ...
    def token_bytes(self, token: int) -> bytes: ...


class Tokenizing(Backend):
    """An engine with a separate tokenizer."""

    _tokenizer: Tokenizer

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def least_tokens(self, text: str) -> int:
        return self._tokenizer.least_tokens(text)

    def control_texts(self) -> Sequence[str]:
        return self._tokenizer.control_texts()

    def token_bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)


class Recomputing(Tokenizing):
    """An engine without attention state: a sequence is its tokens, and each row is computed from all of them.

    A subclass computes the logits, and tells how much memory it takes. Rows are sampled on the host.
    """

    rewinds = True

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer, options: LoadOptions) -> None:
        """Sets up the engine. Raises UsageError for adapters, and for more context than the model has."""
        if options.adapters:
            raise UsageError(f"the {self.name} engine does not support adapters", "use another --backend")
        self.info = info
        self.context = context_length(options.context, info.trained_context)
        self.max_sequences = options.sequences
        self._tokenizer = tokenizer
        self._held: dict[int, list[int]] = {}
        self._rows: dict[tuple[int, int], NDArray[np.float32]] = {}  # by sequence and tokens after it
        self._sampler = Sampler(info.vocabulary)

    @abstractmethod
    def row(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Returns the raw logits after these tokens, float32 [V]."""

    def open(self) -> int:
        sequence = free_sequence(self._held, self.max_sequences)
        self._held[sequence] = []
        return sequence

    def release(self, sequence: int) -> None:
        del self._held[sequence]
        self._rows = {at: row for at, row in self._rows.items() if at[0] != sequence}

    def length(self, sequence: int) -> int:
        return len(self._held[sequence])

    def fork(self, sequence: int) -> int:
        copy = self.open()
        self._held[copy] = list(self._held[sequence])
        return copy

    def trim(self, sequence: int, length: int) -> int:
        del self._held[sequence][length:]
        return self.length(sequence)

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        check_feeds(feeds, self.info.vocabulary)
        self._check_room(feeds)
        rows = {}
        for feed in feeds:
            if cancelled():
                raise CancelledError
            tokens = [*self._held[feed.sequence], *feed.tokens]
            for back in range(feed.wanted):
                rows[feed.sequence, back] = self.row(tokens[: len(tokens) - back])
        for feed in feeds:
            self._held[feed.sequence] += feed.tokens
        self._rows = rows

    def _check_room(self, feeds: Sequence[Feed]) -> None:
        """Raises ContextFullError if the feeds do not fit."""
        for feed in feeds:
            check_length(len(self._held[feed.sequence]), len(feed.tokens), self.context)

    def sample(self, rows: Sequence[Row]) -> list[Draw]:
        return [
            self._sampler.sample(self._rows[r.sequence, r.back], r.params, r.u, r.seen, r.legal) for r in rows
        ]

    def logits(self, sequence: int, back: int = 0) -> NDArray[np.float32]:
        return self._rows[sequence, back].copy()

    def describe(self) -> str:
        return f"context {self.context:,} tokens"

    @property
    def arithmetic(self) -> str:
        return "cpu, float32"

    def close(self) -> None:
        self._held.clear()
        self._rows.clear()
