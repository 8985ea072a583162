"""The tokenizer of a Hugging Face model folder, for the engines that run such folders.

    tokenizer = Tokenizer(Path("folder"))
    tokenizer.encode("Hello", add_special=True, parse_special=False)

It uses the `tokenizers` package alone. The files' own code (`auto_map`) is never read.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emlocal.errors import ModelError
from emlocal.files import MAX_JSON_BYTES, TOOL_USE, read_chat_template, read_json, read_regular
from emlocal.models.gguf.header import shown
from emlocal.models.unpacked.tokenizer import byte_letters
from emlocal.models.vocabulary import end_tokens

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as FastTokenizer

_BYTE_OF = {letter: byte for byte, letter in enumerate(byte_letters())}

_SHORT = 8_192  # characters
_MOST_SHRINKING = 4
"""The factor by which NFC can shrink a text's bytes, rounded up from 3.5; a test checks every character."""


class Tokenizer:
    """A tokenizer: text to tokens and back. Not for use from two threads at once.

    The small files are read at once, tokenizer.json when it is first needed.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the folder's small files.

        Raises ModelError if config.json or tokenizer.json is missing, or if one of the files is broken.
        """
        self.folder = folder
        self._config = read_json(folder / "config.json")
        self._generation = read_json(folder / "generation_config.json", required=False)
        self._own = read_json(folder / "tokenizer_config.json", required=False)
        if not (folder / "tokenizer.json").is_file():
            raise ModelError(
                f"{folder} has no tokenizer.json",
                hint="fetch that file too; emlocal reads no other tokenizer format",
            )
        self._pieces: dict[int, bytes] = {}
        self._encoding = threading.Lock()

    @cached_property
    def _fast(self) -> FastTokenizer:
        from tokenizers import Tokenizer as FastTokenizer

        path = self.folder / "tokenizer.json"
        try:
            raw = read_regular(path, MAX_JSON_BYTES)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}", "fetch it again") from error
        try:
            tokenizer = FastTokenizer.from_buffer(raw)
        except Exception as why:  # the package raises plain Exceptions
            raise ModelError(
                f"{path} is not a usable tokenizer: {shown(str(why))}", "fetch it again"
            ) from why
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self._fast.get_added_tokens_decoder()

    @cached_property
    def _byte_level(self) -> bool:
        """Whether tokens are spelt in GPT-2's letters for bytes; otherwise with "▁" and <0x0A>."""
        return "ByteLevel" in repr(self._fast.decoder)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Returns the token ids of a text.

        `add_special`: with the model's BOS and the like. `parse_special`: read "<|im_end|>" and its kind as
        the tokens that they name. A lone surrogate becomes "?".
        """
        clean = text.encode("utf-8", errors="replace").decode()
        with self._encoding:
            self._fast.encode_special_tokens = not parse_special
            if len(clean) <= _SHORT:
                return self._fast.encode(clean, add_special_tokens=add_special).ids
            # Only the call for several texts lets other threads run meanwhile.
            return self._fast.encode_batch([clean], add_special_tokens=add_special)[0].ids

    def least_tokens(self, text: str) -> int:
        """Returns a lower bound of the tokens of a text, without tokenizing it; 0 if nothing is certain."""
        if self._longest is None:
            return 0
        longest, shrinks = self._longest
        kept = "".join(text.split()) if shrinks else text
        return len(kept.encode(errors="replace")) // (longest * _MOST_SHRINKING)

    @cached_property
    def _longest(self) -> tuple[int, bool] | None:
        """(the most bytes in a token's text, whether white space beside special tokens vanishes).

        None for a tokenizer that may drop or rewrite parts of a text.
        """
        shape = json.loads(self._fast.to_str(), object_hook=_without_vocabulary)
        model = shape["model"]
        letters = byte_letters() if self._byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        known = self._fast.get_vocab(with_added_tokens=True)
        whole = model.get("type") == "BPE" and all(letter in known for letter in letters)
        steps = [*_steps(shape.get("normalizer")), *_steps(shape.get("pre_tokenizer"))]
        if not whole or not all(_keeps_all(step) for step in steps):
            return None
        shrinks = any(token.lstrip or token.rstrip for token in self._added.values())
        return max(len(text.encode()) for text in known), shrinks

    def control_texts(self) -> Sequence[str]:
        """Returns the texts that `encode` reads as control tokens with `parse_special`."""
        return tuple(token.content for token in self._added.values() if token.special)

    def token_bytes(self, token: int) -> bytes:
        """Returns the UTF-8 bytes of a token, which may be a part of a character.

        They are empty for control tokens and for ids without a token (a model may have more rows than its
        tokenizer has tokens).
        """
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._piece(token)
        return piece

    def _piece(self, token: int) -> bytes:
        added = self._added.get(token)
        if added is not None:
            return b"" if added.special else added.content.encode()
        text = self._fast.id_to_token(token)
        if text is None:
            return b""
        if self._byte_level:
            return b"".join(
                bytes([_BYTE_OF[letter]]) if letter in _BYTE_OF else letter.encode() for letter in text
            )
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    @property
    def vocabulary(self) -> int:
        """Rows of the model's logits; there may be fewer tokens."""
        size = self._config.get("vocab_size")
        if not isinstance(size, int) or size < 1:
            raise ModelError(f"{self.folder / 'config.json'} does not say its vocab_size", "fetch it again")
        return size

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a generation: the folder's, and those that llama.cpp knows by their text."""
        said = [t for config in (self._generation, self._config) for t in _ids(config.get("eos_token_id"))]
        return end_tokens(self._fast.token_to_id, [*said, self._fast.token_to_id(self.eos)])

    @property
    def bos(self) -> str:
        """The text of the token that begins a text; "" if there is none."""
        return _token_text(self._own.get("bos_token"))

    @property
    def eos(self) -> str:
        """The text of the token that ends a text; "" if there is none."""
        return _token_text(self._own.get("eos_token"))

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template. It is untrusted: render it in a sandbox."""
        return read_chat_template(self.folder)

    @cached_property
    def tool_template(self) -> str | None:
        """The one for conversations with tools, where the model has one of its own."""
        return read_chat_template(self.folder, TOOL_USE)


def _without_vocabulary(table: dict[str, Any]) -> dict[str, Any]:
    """Returns a table of tokenizer.json without the large tables in it."""
    return {name: value for name, value in table.items() if name not in ("vocab", "merges", "added_tokens")}


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yields a normalizer or pre-tokenizer, or the steps that it consists of."""
    if step is not None and step.get("type") == "Sequence":
        for inner in (*step.get("normalizers", ()), *step.get("pretokenizers", ())):
            yield from _steps(inner)
    elif step is not None:
        yield step


def _keeps_all(step: dict[str, Any]) -> bool:
    """Returns whether a step drops nothing, and makes no text shorter than NFC does."""
    kind = step.get("type")
    if kind == "Split":
        return step.get("behavior") != "Removed"
    if kind == "Replace":
        pattern = step.get("pattern", {}).get("String")
        return isinstance(pattern, str) and len(step.get("content", "").encode()) >= len(pattern.encode())
    return kind in ("NFC", "Prepend", "ByteLevel", "Metaspace", "Digits")


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _token_text(value: object) -> str:
    """Returns the text of a token that is written as its text, or as a table with its `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""
