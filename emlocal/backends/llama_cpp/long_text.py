"""Long texts cut where llama.cpp's tokens cannot run across, and a bound on how few tokens a text has.

llama.cpp tokenizes some long texts in time that grows with the square of their length: where names of special
tokens are many (it searches the rest of the text for each), and where characters fall back to bytes in a
SentencePiece vocabulary (it copies all tokens so far for each). In pieces both are linear.

Two kinds of places are safe to cut at, with the same tokens as the whole text has:

- After the name of a special token that overlaps no other name. llama.cpp takes such names out first, the
  longest first, and tokenizes what is between them each for itself.
- After a character that no token's text contains. No token runs across it, since SentencePiece builds tokens
  out of the vocabulary's texts only. The next piece begins with that character once more, as llama.cpp puts
  a space before each piece, and its tokens are left out.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from emlocal.models.unpacked.tokenizer import byte_letters
from emlocal.text import longest_of

LONG = 8_192
"""Characters from which a text is cut."""
_PIECE = 4_096  # characters, or more where there is no safe place


class Piece(NamedTuple):
    """A part of a text."""

    text: str
    again: str
    """The end of the piece before, with which this one begins."""


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
        """Bytes. One token stands for no more of a text's bytes, and for no more of its characters."""
        known = set(texts)
        self._cuttable = (self._sentencepiece or byte_pairs) and not self._strips
        if self._sentencepiece:
            spelt = [f"<0x{byte:02X}>" in known for byte in range(256)]
            self._bounded = all(spelt)
        else:  # llama.cpp drops bytes that the vocabulary lacks
            spelt = [letter in known for letter in byte_letters()]
            self._bounded = byte_pairs
        """Whether `least_tokens` can say anything: other kinds drop, merge or rewrite what they do not
        know."""
        # Some byte-pair vocabularies put lower case for upper case, which can take fewer bytes: of each
        # character only the first byte counts there.
        inner = () if self._sentencepiece else range(0x80, 0xC0)
        self._uncounted = bytes({*inner, *(byte for byte, there in enumerate(spelt) if not there)})

    def least_tokens(self, text: str) -> int:
        """As many tokens the text has at least; 0 where nothing is certain."""
        if not self._bounded:
            return 0
        if self._strips:
            text = "".join(text.split())
        return len(text.encode(errors="replace").translate(None, self._uncounted)) // self._longest

    def pieces(self, text: str, parse_special: bool) -> Iterator[Piece]:
        """The text in pieces of some thousand characters, as far as there are safe places."""
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
        """(where, what the next piece begins with again), in order."""
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
        """Cuts after characters of no token, in a part of the text without names."""
        if unmergeable is not None:
            for hit in unmergeable.finditer(text, start, stop):
                yield hit.end(), hit[0]

    def _unmergeable(self, text: str) -> "re.Pattern[str] | None":
        """What finds the characters of the text that no token contains; None where there are none."""
        free = set(text) - self._characters if self._sentencepiece else set()
        return re.compile(f"[{''.join(map(re.escape, sorted(free)))}]") if free else None


@lru_cache(maxsize=8)
def _names(texts: tuple[str, ...]) -> re.Pattern[str]:
    """What finds the longest of these names at every place, also at those within another name."""
    return re.compile(f"(?=({longest_of(texts)}))")


def join_pieces(
    encode: Callable[[str, bool, bool], list[int]],
    pieces: Iterator[Piece],
    add_special: bool,
    parse_special: bool,
) -> list[int]:
    """The tokens of the whole text."""
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
