"""An engine without a model: bytes for tokens, logits by script. The fast tests run on it.

Its vocabulary is the 256 bytes and one end token. Logits are a function of the tokens so far, so every part
of the contract (forking, trimming, batching) has an exact expected answer.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from emlocal.backends.base import Feed, LoadOptions, ModelInfo, Recomputing
from emlocal.errors import ContextFullError

END = 256
VOCABULARY = 257
Script = Callable[[Sequence[int]], NDArray[np.float32]]

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def hashed(tokens: Sequence[int]) -> NDArray[np.float32]:
    """Returns logits that depend on every token so far, in order; standard normal, times 3."""
    digest = hashlib.blake2b(np.asarray(tokens, dtype=np.int32).tobytes(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    return (3 * rng.standard_normal(VOCABULARY)).astype(np.float32)


def saying(*replies: str, sharpness: float = 12.0) -> Script:
    """Returns a script that answers the n-th "[assistant]" in the prompt with the n-th reply, then ends."""
    marker = b"[assistant]"

    def script(tokens: Sequence[int]) -> NDArray[np.float32]:
        text = bytes(t for t in tokens if t < END)
        turn = text.count(marker)
        reply = replies[min(max(turn, 1), len(replies)) - 1].encode()
        said = text[text.rindex(marker) + len(marker) :] if turn else text
        row = np.zeros(VOCABULARY, dtype=np.float32)
        row[reply[len(said)] if said == reply[: len(said)] and len(said) < len(reply) else END] = sharpness
        return row

    return script


class Bytes:
    """A tokenizer whose tokens are the bytes."""

    end_tokens = frozenset({END})
    bos = eos = ""
    chat_template = CHAT_TEMPLATE
    tool_template = None

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return list(text.encode())

    def least_tokens(self, text: str) -> int:
        return len(text)

    def control_texts(self) -> Sequence[str]:
        return ()

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < END else b""


class FakeBackend(Recomputing):
    """A fake engine. `fed` counts the tokens that went through `forward`, which shows prefix reuse."""

    name: ClassVar[str] = "fake"

    def __init__(
        self,
        script: Script = hashed,
        *,
        context: int = 4096,
        sequences: int = 8,
        trims: bool = True,
        shared: bool = True,
        chat_template: str = CHAT_TEMPLATE,
    ) -> None:
        info = ModelInfo(
            name="fake",
            architecture="fake",
            vocabulary=VOCABULARY,
            trained_context=context,
            end_tokens=Bytes.end_tokens,
            chat_template=chat_template,
        )
        super().__init__(info, Bytes(), LoadOptions(context, sequences))
        self.fed = 0
        self._script = script
        self._shared = shared
        self._trims = self.rewinds = trims

    def row(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self._script(tokens)

    def trim(self, sequence: int, length: int) -> int:
        kept = length if self._trims or length >= self.length(sequence) else 0
        return super().trim(sequence, kept)

    def forward(self, feeds: Sequence[Feed], cancelled: Callable[[], bool] = lambda: False) -> None:
        super().forward(feeds, cancelled)
        self.fed += sum(len(feed.tokens) for feed in feeds)

    def _check_room(self, feeds: Sequence[Feed]) -> None:
        super()._check_room(feeds)
        new, held = sum(len(feed.tokens) for feed in feeds), sum(map(len, self._held.values()))
        if self._shared and held + new > self.context:
            raise ContextFullError(
                f"{held} tokens held and {new} new ones exceed the context of {self.context}"
            )

    @property
    def arithmetic(self) -> str:
        return "none"

    def memory_bytes(self) -> int:
        return 4 * self.context
