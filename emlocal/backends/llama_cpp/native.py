"""llama.cpp's structures in Python: a batch to decode, its logits, and the loaded vocabulary."""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emlocal.backends.base import ModelInfo
from emlocal.models.gguf.header import GGUFHeader


class Batch:
    """A llama_batch.

    `capacity`: at most the context's n_batch, beyond which llama_decode aborts the process.
    """

    def __init__(self, lib: Any, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self.wanted: list[tuple[int, int]] = []
        """Of each row of logits that is computed: its sequence, and how many fed tokens come after it."""
        self._token = np.zeros(capacity, dtype=np.int32)
        self._pos = np.zeros(capacity, dtype=np.int32)
        self._logits = np.zeros(capacity, dtype=np.int8)
        self._sequence = np.zeros(capacity, dtype=np.int32)
        # each token belongs to one sequence: a list of length 1 at an address of its own
        self._lengths = np.ones(capacity, dtype=np.int32)
        self._lists = self._sequence.ctypes.data + 4 * np.arange(capacity, dtype=np.uintp)
        self.struct = lib.llama_batch()
        arrays: dict[str, NDArray[Any]] = {
            "token": self._token,
            "pos": self._pos,
            "logits": self._logits,
            "n_seq_id": self._lengths,
            "seq_id": self._lists,
        }
        types = dict(self.struct._fields_)
        for name, array in arrays.items():
            setattr(self.struct, name, ctypes.cast(array.ctypes.data, types[name]))

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.capacity - self.size

    def add(self, sequence: int, tokens: Sequence[int], position: int, wanted: int, after: int = 0) -> None:
        """Appends tokens of a sequence, from `position` on, with the logits after the `wanted` last ones.

        `after`: number of tokens of the same feed that come in later batches.
        """
        first, n = self.size, len(tokens)
        last = first + n - 1
        if n == 1:  # a step of decoding: three stores
            self._token[first], self._pos[first], self._sequence[first] = tokens[0], position, sequence
        else:
            self._token[first : last + 1] = tokens
            self._pos[first : last + 1] = np.arange(position, position + n)
            self._sequence[first : last + 1] = sequence
            self._logits[first : last + 1] = 0
        self._logits[last] = wanted > 0
        if wanted == 1:
            self.wanted.append((sequence, after))
        elif wanted:
            self._logits[last + 1 - wanted : last + 1] = 1
            self.wanted += ((sequence, after + back) for back in range(wanted - 1, -1, -1))
        self.size = self.struct.n_tokens = last + 1

    def clear(self) -> None:
        """Empties the batch."""
        self.size = self.struct.n_tokens = 0
        self.wanted = []


def address_of_logits(lib: Any) -> Callable[[Any], int | None]:
    """Returns llama_get_logits as a function from context to address; the binding's makes a pointer object.

    At that address are the rows that the last batch wanted, one after the other, float32 [wanted, V].
    """
    prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    function: Callable[[Any], int | None] = prototype(
        ctypes.cast(lib.llama_get_logits, ctypes.c_void_p).value or 0
    )
    return function


def view(address: int, rows: int, vocabulary: int) -> NDArray[np.float32]:
    """Returns llama.cpp's memory as float32 [rows, vocabulary]; valid until the next decode."""
    raw = (ctypes.c_float * (rows * vocabulary)).from_address(address)
    return np.ctypeslib.as_array(raw).reshape(rows, vocabulary)


class EndTokens(Set[int]):
    """The tokens that end a generation, asked for one by one: listing them takes 40 ms for 151,936 tokens."""

    def __init__(self, lib: Any, vocab: Any, size: int) -> None:
        self._lib, self._vocab, self._size = lib, vocab, size
        self._known: dict[object, bool] = {}

    @classmethod
    def _from_iterable(cls, tokens: Iterable[Any]) -> Set[Any]:  # for `&` and the like
        return frozenset(tokens)

    def __contains__(self, token: object) -> bool:
        ends = self._known.get(token)
        if ends is None:
            valid = isinstance(token, int) and 0 <= token < self._size
            ends = self._known[token] = valid and bool(self._lib.llama_vocab_is_eog(self._vocab, token))
        return ends

    def __iter__(self) -> Iterator[int]:
        return (token for token in range(self._size) if token in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def control_texts(lib: Any, vocab: Any, size: int) -> tuple[str, ...]:
    """Returns the names of control tokens, "<|im_end|>" and its kind; takes 50 ms for 151,936 tokens."""
    control = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
    tokens = (t for t in range(size) if lib.llama_vocab_get_attr(vocab, t) & control)
    texts = ((lib.llama_vocab_get_text(vocab, t) or b"").decode(errors="replace") for t in tokens)
    return tuple(text for text in texts if text)


def model_info(lib: Any, model: Any, name: str, header: GGUFHeader) -> ModelInfo:
    """Returns the facts about the model, from the loaded vocabulary and the file's header."""
    vocab = lib.llama_model_get_vocab(model)
    size = int(lib.llama_vocab_n_tokens(vocab))

    def text(token: int) -> str:
        raw = lib.llama_vocab_get_text(vocab, token) if 0 <= token < size else b""
        return (raw or b"").decode(errors="replace")

    return ModelInfo(
        name=name,
        architecture=header.architecture,
        vocabulary=size,
        trained_context=int(lib.llama_model_n_ctx_train(model)),
        end_tokens=EndTokens(lib, vocab, size),
        chat_template=header.chat_template,
        tool_template=header.tool_template,
        bos=text(int(lib.llama_vocab_bos(vocab))),
        eos=text(int(lib.llama_vocab_eos(vocab))),
        sampling=header.sampling,
    )
