"""What torch and mlx have in common: a tokenizer of their own, and a slot of a cache for each sequence."""

from abc import abstractmethod
from collections.abc import Sequence, Set
from typing import Protocol

from emlocal.backends.base import Backend, Feed, ModelInfo
from emlocal.backends.context import context_length
from emlocal.backends.options import LoadOptions
from emlocal.errors import BackendError, ContextFullError
from emlocal.formatting import counted


class Tokenizer(Protocol):
    """What an engine needs of a tokenizer; `emlocal.models.tokenizer.Tokenizer` is one."""

    @property
    def end_tokens(self) -> Set[int]: ...
    @property
    def bos(self) -> str: ...
    @property
    def eos(self) -> str: ...
    @property
    def chat_template(self) -> str | None: ...
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]: ...
    def least_tokens(self, text: str) -> int: ...
    def control_texts(self) -> Sequence[str]: ...
    def token_bytes(self, token: int) -> bytes: ...


class Slots(Protocol):
    """What is asked of a cache here."""

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` cells of one slot into another, empty one."""

    def clear(self, slot: int, start: int, stop: int) -> None:
        """Zero these cells."""


class SlotBackend(Backend):
    """An engine whose sequences are the slots of a cache; each has room for the whole context."""

    def __init__(self, tokenizer: Tokenizer, info: ModelInfo, options: LoadOptions) -> None:
        self.info = info
        self.context = context_length(options.context, info.trained_context)
        self.max_sequences = options.sequences
        self._tokenizer = tokenizer
        self._adapters = len(options.adapters)
        self._lengths: dict[int, int] = {}
        self._rows: dict[int, int] = {}  # of the last call's logits, by sequence

    @property
    @abstractmethod
    def _cache(self) -> Slots:
        """Where keys and values are."""

    @abstractmethod
    def _reserve(self, slots: int, tokens: int) -> None:
        """Make room for so many slots of so many tokens. Raises BackendError where memory runs out."""

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def least_tokens(self, text: str) -> int:
        return self._tokenizer.least_tokens(text)

    def control_texts(self) -> Sequence[str]:
        return self._tokenizer.control_texts()

    def token_bytes(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)

    def open(self) -> int:
        free = next((s for s in range(self.max_sequences) if s not in self._lengths), None)
        if free is None:
            raise BackendError(f"all {self.max_sequences} sequences are in use")
        self._lengths[free] = 0
        return free

    def release(self, sequence: int) -> None:
        self._cache.clear(sequence, 0, self._lengths.pop(sequence))
        self._rows.pop(sequence, None)

    def length(self, sequence: int) -> int:
        return self._lengths[sequence]

    def fork(self, sequence: int) -> int:
        length = self._lengths[sequence]
        copy = self.open()
        if length:
            try:
                self._reserve(copy + 1, length)
            except BackendError:
                del self._lengths[copy]
                raise
            self._cache.copy(sequence, copy, length)
        self._lengths[copy] = length
        return copy

    def trim(self, sequence: int, length: int) -> int:
        held = self._lengths[sequence]
        if length < held:
            self._cache.clear(sequence, length, held)
            self._lengths[sequence] = length
        return self._lengths[sequence]

    def _lengths_of(self, feeds: Sequence[Feed]) -> list[int]:
        """What the sequences hold. Raises ContextFullError where the feeds do not fit."""
        lengths = [self._lengths[feed.sequence] for feed in feeds]
        for feed, held in zip(feeds, lengths, strict=True):
            if held + len(feed.tokens) > self.context:
                raise ContextFullError(
                    f"{counted(len(feed.tokens), 'more token')} cannot be added: the sequence"
                    f" holds {held:,} of {self.context:,}",
                    "give a larger --context",
                )
        return lengths

    def _undo(self, feeds: Sequence[Feed], lengths: Sequence[int]) -> None:
        """Take away what was computed of a call that failed."""
        for feed, held in zip(feeds, lengths, strict=True):
            self._cache.clear(feed.sequence, held, held + len(feed.tokens))
