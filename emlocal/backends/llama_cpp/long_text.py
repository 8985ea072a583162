"""Long texts, cut where no token of llama.cpp crosses, and a lower bound of the tokens of a text.

llama.cpp tokenizes some long texts in time that grows with the square of their length. One kind are texts
with many names of special tokens: it searches the rest of the text for each. The other are texts with
characters that fall back to bytes in a SentencePiece vocabulary: it copies all tokens so far for each. In
pieces both take linear time.

Two kinds of places are safe to cut at, with the same tokens as the whole text has:

- After the name of a special token that overlaps no other name. llama.cpp takes such names out first, the
  longest first, and tokenizes each part between them by itself.
- After a character that no token's text contains. No token crosses it, since SentencePiece builds tokens from
  the vocabulary's texts only. The next piece begins with that character once more, as llama.cpp puts a space
  before each piece, and its tokens are left out.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from emlocal.models.unpacked.tokenizer import byte_letters
from emlocal.text import longest_of

LONG = 8_192
"""Texts with more characters than this are cut."""
_PIECE = 4_096  # characters, or more if there is no safe place


class Piece(NamedTuple):
    """A part of a text."""

    text: str
    again: str
    """The end of the piece before, repeated at the beginning of this one."""


class TokenTexts:
    """The texts of a vocabulary's tokens, listed once: 0.1 s for 151,936 of them."""

    def __init__(self, lib: Any, vocab: Any, size: int) -> None:
        kind = lib.llama_vocab_type(vocab)
        self._sentencepiece = kind == lib.LLAMA_VOCAB_TYPE_SPM
        byte_pairs = kind == lib.LLAMA_VOCAB_TYPE_BPE
        raw = [lib.llama_vocab_get_text(vocab, token) or b"" for token in range(size)]
        attributes = [lib.llama_vocab_get_attr(vocab, token) for token in range(size)]
        texts = [text.decode(errors="replace") for text in raw]
        hidden = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
        strips = lib.LLAMA_TOKEN_ATTR_LSTRIP | lib.LLAMA_TOKEN_ATTR_RSTRIP
        self._strips = any(attribute & strips for attribute in attributes)
        """Whether white space beside a special token vanishes."""
        pairs = list(zip(texts, attributes, strict=True))
        self._shown = tuple(t for t, a in pairs if t and a & lib.LLAMA_TOKEN_ATTR_USER_DEFINED)
        self._special = (*self._shown, *(t for t, a in pairs if t and a & hidden))
        self._characters = frozenset().union(*texts) | {" "}
        self._longest = max(map(len, raw), default=1)
        """Bytes of the longest token. No token stands for more of a text's bytes, or of its characters."""
        known = set(texts)
        self._cuttable = (self._sentencepiece or byte_pairs) and not self._strips
        if self._sentencepiece:
            spelt = [f"<0x{byte:02X}>" in known for byte in range(256)]
            self._bounded = all(spelt)
        else:  # llama.cpp drops bytes that the vocabulary lacks
            spelt = [letter in known for letter in byte_letters()]
            self._bounded = byte_pairs
        """Whether `least_tokens` can give a bound.

        Other kinds of vocabularies drop, merge or rewrite unknown parts.
        """
        # Some byte-pair vocabularies put lower case for upper case, which can take fewer bytes. There only
        # the first byte of each character counts.
        inner = () if self._sentencepiece else range(0x80, 0xC0)
        self._uncounted = bytes({*inner, *(byte for byte, there in enumerate(spelt) if not there)})

    def least_tokens(self, text: str) -> int:
        """Returns a lower bound of the tokens of a text; 0 if nothing is certain."""
        if not self._bounded:
            return 0
        if self._strips:
            text = "".join(text.split())
        return len(text.encode(errors="replace").translate(None, self._uncounted)) // self._longest

    def pieces(self, text: str, parse_special: bool) -> Iterator[Piece]:
        """Yields the text in pieces of some thousand characters, cut only at safe places."""
        if not self._cuttable:
            yield Piece(text, "")
            return
        start, again = 0, ""
        for at, repeat in self._cuts(text, parse_special):
            if at - start >= _PIECE:
                yield Piece(text[start - len(again) : at], again)
                start, again = at, repeat
        if start < len(text) or start == 0:
            yield Piece(text[start - len(again) :], again)

    def _cuts(self, text: str, parse_special: bool) -> Iterator[tuple[int, str]]:
        """Yields (where to cut, the text that the next piece repeats), in order."""
        names = _names(self._special if parse_special else self._shown)
        unmergeable = self._unmergeable(text)
        begin = end = 0  # of the names that overlap one another
        alone = False
        for hit in names.finditer(text):
            at, after = hit.start(), hit.start() + len(hit[1])
            if at < end:
                alone = alone and after <= end  # the first covers this one
                end = max(end, after)
                continue
            if alone:
                yield end, ""
            yield from self._between(text, unmergeable, end, at)
            begin, end, alone = at, after, True
        if alone and begin < end:
            yield end, ""
        yield from self._between(text, unmergeable, end, len(text))

    def _between(
        self, text: str, unmergeable: "re.Pattern[str] | None", start: int, stop: int
    ) -> Iterator[tuple[int, str]]:
        """Yields cuts after characters that no token contains, in a part of the text without names."""
        if unmergeable is not None:
            for hit in unmergeable.finditer(text, start, stop):
                yield hit.end(), hit[0]

    def _unmergeable(self, text: str) -> "re.Pattern[str] | None":
        """Returns a pattern of the text's characters that no token contains; None if there are none."""
        free = set(text) - self._characters if self._sentencepiece else set()
        return re.compile(f"[{''.join(map(re.escape, sorted(free)))}]") if free else None


@lru_cache(maxsize=8)
def _names(texts: tuple[str, ...]) -> re.Pattern[str]:
    """Returns a pattern that finds the longest name at every place, also within another name."""
    return re.compile(f"(?=({longest_of(texts)}))")


def join_pieces(
    encode: Callable[[str, bool, bool], list[int]],
    pieces: Iterator[Piece],
    add_special: bool,
    parse_special: bool,
) -> list[int]:
    """Returns the tokens of the whole text."""
    first = next(pieces)
    second = next(pieces, None)
    if second is None:
        return encode(first.text, add_special, parse_special)
    plain, framed = encode("x", False, False), encode("x", add_special, False)
    before = next(i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
    tokens = framed[:before] + encode(first.text, False, parse_special)
    piece: Piece | None = second
    while piece is not None:
        again = len(encode(piece.again, False, parse_special)) if piece.again else 0
        tokens += encode(piece.text, False, parse_special)[again:]
        piece = next(pieces, None)
    return tokens + framed[before + len(plain) :]
