"""What a loaded model says of itself and of its tokens."""

from collections.abc import Iterable, Iterator, Set
from typing import Any

from emlocal.backends.base import ModelInfo
from emlocal.models.gguf.header import GGUFHeader


class EndTokens(Set[int]):
    """The tokens that end a generation, by asking: to list them takes 40 ms for 151,936 tokens."""

    def __init__(self, lib: Any, vocab: Any, size: int) -> None:
        self._lib, self._vocab, self._size = lib, vocab, size
        self._known: dict[object, bool] = {}

    @classmethod
    def _from_iterable(cls, tokens: Iterable[Any]) -> Set[Any]:  # of `&` and the like
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
    """The names of control tokens, "<|im_end|>" and its kind; 50 ms for 151,936 tokens."""
    control = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
    tokens = (t for t in range(size) if lib.llama_vocab_get_attr(vocab, t) & control)
    texts = ((lib.llama_vocab_get_text(vocab, t) or b"").decode(errors="replace") for t in tokens)
    return tuple(text for text in texts if text)


def model_info(lib: Any, model: Any, name: str, header: GGUFHeader) -> ModelInfo:
    """What the model says of itself, from the loaded vocabulary and the file's header."""
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
        bos=text(int(lib.llama_vocab_bos(vocab))),
        eos=text(int(lib.llama_vocab_eos(vocab))),
        sampling=header.sampling,
    )
