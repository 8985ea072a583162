"""The contract of `backends/base.py` on llama.cpp, for any CPU.

Sequences share one KV pool (`kv_unified`), so a fork costs nothing until it differs. Logits are read where
llama.cpp wrote them, through numpy views on its output buffer, which are valid until the next decode. Only
the ctypes declarations of llama-cpp-python are used, not its `Llama` class, which detokenizes in O(n²),
cannot hold many sequences, and has silent bugs (docs/decisions.md).
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from emlocal.backends.adapted import Adapting
from emlocal.backends.base import Feed, Row, check_feeds, free_sequence
from emlocal.backends.engine import LoadOptions
from emlocal.backends.llama_cpp.loading import DEFAULT_KV_TYPE, Loading, first_error, forget_errors
from emlocal.backends.llama_cpp.long_text import LONG, TokenTexts, join_pieces
from emlocal.backends.llama_cpp.native import Batch, address_of_logits, control_texts, model_info, view
from emlocal.errors import BackendError, CancelledError, ContextFullError, ModelError
from emlocal.models.adapters import as_gguf
from emlocal.models.adapters.adapter import Adapter
from emlocal.models.memory import KV_TYPE_BYTES, kv_bytes
from emlocal.models.resolve import GGUFModel
from emlocal.sampling import Draw, Sampler
from emlocal.text import counted

_PATIENCE = 0.5  # seconds that `close` waits for an abandoned tokenization
_NO_SLOT, _ABORTED = 1, 2  # llama_decode's results other than 0 and errors < 0


class LlamaCppBackend(Adapting):
    """A GGUF model in llama.cpp."""

    name: ClassVar[str] = "llama.cpp"

    def __init__(
        self, model: GGUFModel, options: LoadOptions = LoadOptions(), loading: Loading | None = None
    ) -> None:
        """Waits for the model and sets it up.

        `loading`: of the same model and options, if it has begun already.
        """
        loading = loading or Loading(model, options)
        self._model, self._context = loading.wait()
        self._lib: Any = loading.lib
        shown = model.path.name if model.source == "path" else model.name
        self.info = model_info(self._lib, self._model, shown, model.header)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.context, self.threads = loading.length, loading.threads
        self.max_sequences = options.sequences
        # a recurrent state cannot go back, and a sliding window has dropped what it would go back to
        self.rewinds = not (
            self._lib.llama_model_is_recurrent(self._model)
            or self._lib.llama_model_is_hybrid(self._model)
            or self._lib.llama_model_n_swa(self._model)
        )
        self._shared = options.shared
        self._kv_type = options.kv_type or DEFAULT_KV_TYPE
        self._placed = loading.placement.describe()
        self._memory = self._lib.llama_get_memory(self._context)
        allocated = self._lib.llama_n_ctx(self._context)  # more than was asked for: a multiple of 256
        self._kv_bytes = kv_bytes(model.header, allocated, KV_TYPE_BYTES[self._kv_type])
        self._header = model.header
        self._adapters: list[tuple[Any, float]] = []
        self._named: list[tuple[Any, float]] = []  # of `add_adapter`
        self._chosen: int | None = None
        try:
            self._put_adapters(options.adapters)
        except BaseException:
            loading.free()  # a `with` block does not free it a second time
            raise
        self._batch = Batch(self._lib, loading.batch)
        self._lengths: dict[int, int] = {}
        self._rows: dict[tuple[int, int], NDArray[np.float32]] = {}  # by sequence and tokens after it
        self._logits_address = address_of_logits(self._lib)
        self._views: dict[tuple[int, int], list[NDArray[np.float32]]] = {}
        self._pieces: dict[int, bytes] = {}
        self._control_texts: Sequence[str] | None = None
        self._texts: TokenTexts | None = None
        self._encoding = threading.Lock()
        self._sampler = Sampler(self.info.vocabulary)
        self._cancelled: Callable[[], bool] = lambda: False
        self._abort = self._lib.ggml_abort_callback(lambda _: self._cancelled())
        self._no_abort = self._lib.ggml_abort_callback()
        self._abortable = False

    def set_adapters(self, adapters: Sequence[tuple[Adapter | Path, float]]) -> None:
        """Computes with these adapters, (adapter, scale), from now on, and frees those loaded before.

        Raises BackendError while a sequence is open, because its state comes from other weights. Raises
        ModelError for an adapter that cannot be used; the earlier ones then stay.
        """
        if self._lengths:
            raise BackendError(
                f"adapters cannot change while {counted(len(self._lengths), 'sequence')} of tokens"
                f" {'is' if len(self._lengths) == 1 else 'are'} open",
                "release them first",
            )
        self._put_adapters(adapters)

    def _put_adapters(self, adapters: Sequence[tuple[Adapter | Path, float]]) -> None:
        # The new ones are loaded before the old ones are freed, because llama.cpp tells adapters apart by
        # address.
        loaded: list[tuple[Any, float]] = []
        try:
            for each, scale in adapters:
                loaded.append((self._load_adapter(each), scale))
        except BaseException:
            for adapter, _ in loaded:
                self._lib.llama_adapter_lora_free(adapter)
            raise
        self._compute_with(loaded)
        self._chosen = None
        for adapter, _ in self._adapters:
            self._lib.llama_adapter_lora_free(adapter)
        self._adapters = loaded

    def add_adapter(self, path: Path, scale: float) -> int:
        self._named.append((self._load_adapter(path), scale))
        return len(self._named) - 1

    def choose_adapter(self, number: int | None) -> None:
        if number != self._chosen:
            self._compute_with([*self._adapters, *([] if number is None else [self._named[number]])])
            self._chosen = number

    def _compute_with(self, adapters: Sequence[tuple[Any, float]]) -> None:
        n = len(adapters)
        pointers = (self._lib.llama_adapter_lora_p_ctypes * n)(*(a for a, _ in adapters))
        scales = (ctypes.c_float * n)(*(s for _, s in adapters))
        self._lib.llama_set_adapters_lora(self._context, pointers, n, scales)

    def _load_adapter(self, adapter: Adapter | Path) -> Any:
        forget_errors()
        with as_gguf(adapter, self._header) as file:
            loaded = self._lib.llama_adapter_lora_init(self._model, os.fsencode(file))
        if not loaded:
            raise ModelError(f"llama.cpp cannot load the adapter {file}: {first_error()}")
        return loaded

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        with self._encoding:
            if len(text) <= LONG:
                return self._encode(text, add_special, parse_special)
            pieces = self._token_texts().pieces(text, parse_special)
            return join_pieces(self._encode, pieces, add_special, parse_special)

    def least_tokens(self, text: str) -> int:
        return self._token_texts().least_tokens(text)

    def _token_texts(self) -> TokenTexts:
        if self._texts is None:
            self._texts = TokenTexts(self._lib, self._vocab, self.info.vocabulary)
        return self._texts

    def _encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        raw = text.encode("utf-8", errors="replace")
        room = len(raw) + 16
        while True:
            buffer = (self._lib.llama_token * room)()
            n = self._lib.llama_tokenize(self._vocab, raw, len(raw), buffer, room, add_special, parse_special)
            if n >= 0:
                return list(buffer[:n])
            room = -n

    def control_texts(self) -> Sequence[str]:
        if self._control_texts is None:
            self._control_texts = control_texts(self._lib, self._vocab, self.info.vocabulary)
        return self._control_texts

    def token_bytes(self, token: int) -> bytes:
        piece = self._pieces.get(token)
        if piece is None:
            buffer = (ctypes.c_char * 64)()
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, 64, 0, False)
            if n < 0:
                buffer = (ctypes.c_char * -n)()
                n = self._lib.llama_token_to_piece(self._vocab, token, buffer, -n, 0, False)
            piece = self._pieces[token] = buffer.raw[:n]
        return piece

    def open(self) -> int:
        sequence = free_sequence(self._lengths, self.max_sequences)
        self._lengths[sequence] = 0
        return sequence

    def release(self, sequence: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        del self._lengths[sequence]
        self._rows = {at: row for at, row in self._rows.items() if at[0] != sequence}

    def length(self, sequence: int) -> int:
        return self._lengths[sequence]

    def fork(self, sequence: int) -> int:
        copy = self.open()
        self._lib.llama_memory_seq_cp(self._memory, sequence, copy, -1, -1)
        self._lengths[copy] = self._lengths[sequence]
        return copy

    def trim(self, sequence: int, length: int) -> int:
        if length < self._lengths[sequence]:
            if length == 0 or not self._lib.llama_memory_seq_rm(self._memory, sequence, length, -1):
                self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
                length = 0
            self._lengths[sequence] = length
        return self._lengths[sequence]

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        check_feeds(feeds, self.info.vocabulary)
        # The abort callback takes the GIL once per graph node: worth it in a long prefill, not in a step.
        long = sum(len(feed.tokens) for feed in feeds) > 2 * len(feeds)
        self._cancelled = cancelled
        if long != self._abortable:
            callback = self._abort if long else self._no_abort
            self._lib.llama_set_abort_callback(self._context, callback, ctypes.c_void_p(0))
            self._abortable = long
        self._rows = {}
        if not self._shared:  # llama.cpp computes sequences together only if their numbers follow in order
            feeds = sorted(feeds)
        for feed in feeds:
            held = self._lengths[feed.sequence]
            if held + len(feed.tokens) > self.context:  # llama.cpp rounds its own length up
                raise ContextFullError(
                    f"{counted(len(feed.tokens), 'more token')} cannot be added: the sequence"
                    f" holds {held:,} of {self.context:,}",
                    "set a larger --context",
                )
        try:
            for feed in feeds:
                self._append(feed, flush=feed is feeds[-1])
        except BaseException:
            self._batch.clear()
            for feed in feeds:  # removes what this call has decoded
                held = self._lengths[feed.sequence]
                if not self._lib.llama_memory_seq_rm(self._memory, feed.sequence, held, -1):
                    self._lib.llama_memory_seq_rm(self._memory, feed.sequence, -1, -1)
                    self._lengths[feed.sequence] = 0  # recurrent models cannot go back part of the way
            raise
        for feed in feeds:
            self._lengths[feed.sequence] += len(feed.tokens)

    def _append(self, feed: Feed, flush: bool) -> None:
        """Puts a feed's tokens into batches, and decodes each batch that is full."""
        start = self._lengths[feed.sequence]
        size = self._batch.capacity
        for i in range(0, len(feed.tokens), size):
            chunk = feed.tokens[i : i + size]
            if len(chunk) > self._batch.room:
                self._decode(keep_rows=True)
            after = len(feed.tokens) - i - len(chunk)
            wanted = min(len(chunk), max(0, feed.wanted - after))
            self._batch.add(feed.sequence, chunk, start + i, wanted, after)
        if flush:
            self._decode(keep_rows=False)

    def _decode(self, keep_rows: bool) -> None:
        forget_errors()
        answer = self._lib.llama_decode(self._context, self._batch.struct)
        if answer == _ABORTED or self._cancelled():
            raise CancelledError
        if answer == _NO_SLOT:
            held = sum(self._lengths.values())
            raise ContextFullError(
                f"{counted(self._batch.size, 'more token')} cannot be added: the context"
                f" holds {held:,} of {self.context:,}",
                "set a larger --context",
            )
        if answer != 0:
            raise BackendError(f"llama_decode failed with {answer}: {first_error()}")
        if wanted := self._batch.wanted:
            rows = self._logits_of_batch(len(wanted))
            self._rows.update(zip(wanted, [row.copy() for row in rows] if keep_rows else rows, strict=True))
        self._batch.clear()

    def _logits_of_batch(self, n: int) -> list[NDArray[np.float32]]:
        """Returns views on the rows that the batch wanted, made once for each address that llama.cpp uses."""
        address = self._logits_address(self._context)
        if address is None:
            raise BackendError("llama.cpp returned no logits for tokens that needed them")
        rows = self._views.get((address, n))
        if rows is None:
            rows = self._views[address, n] = list(view(address, n, self.info.vocabulary))
        return rows

    def sample(self, rows: Sequence[Row]) -> list[Draw]:
        return [
            self._sampler.sample(self._rows[r.sequence, r.back], r.params, r.u, r.seen, r.legal) for r in rows
        ]

    def logits(self, sequence: int, back: int = 0) -> NDArray[np.float32]:
        return self._rows[sequence, back].copy()

    def describe(self) -> str:
        adapters = f", {counted(len(self._adapters), 'adapter')}" if self._adapters else ""
        placed = f", {self._placed}" if self._placed else ""
        return (
            f"context {counted(self.context, 'token')}, {counted(self.threads, 'thread')}{placed}{adapters}"
        )

    @property
    def arithmetic(self) -> str:
        return f"{self._placed or 'cpu'}, keys and values in {self._kv_type}"

    def memory_bytes(self) -> int:
        # without the compute buffers, which llama.cpp does not report
        return int(self._lib.llama_model_size(self._model)) + self._kv_bytes

    def close(self) -> None:
        if not self._encoding.acquire(timeout=_PATIENCE):
            return  # an abandoned tokenization reads the vocabulary: the memory goes with the process
        self._rows, self._views = {}, {}
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


def bare_decode(backend: LlamaCppBackend, sequence: int, token: int, steps: int) -> list[float]:
    """Decodes as cheaply as this engine allows: `llama_decode`, an argmax, and nothing else.

    `emlocal bench` compares the decode loop with it. Anyone could write this program on llama-cpp-python's C
    functions in ten lines, on the same model and context.

    Returns the seconds of each of `steps` greedy steps after `token`; the sequence is afterwards as before.
    """
    lib, context, vocabulary = backend._lib, backend._context, backend.info.vocabulary
    batch = lib.llama_batch_init(1, 0, 1)
    start = backend.length(sequence)
    seconds = []
    try:
        for position in range(start, start + steps):
            began = time.perf_counter()
            batch.token[0], batch.pos[0], batch.logits[0] = token, position, 1
            batch.n_seq_id[0], batch.seq_id[0][0] = 1, sequence
            batch.n_tokens = 1
            if lib.llama_decode(context, batch) != 0:
                raise BackendError(f"llama_decode failed at position {position:,} of {backend.context:,}")
            logits = np.ctypeslib.as_array(lib.llama_get_logits(context), (vocabulary,))
            token = int(logits.argmax())
            seconds.append(time.perf_counter() - began)
    finally:
        lib.llama_memory_seq_rm(backend._memory, sequence, start, -1)
        lib.llama_batch_free(batch)
    return seconds
