"""Constraints on an answer, by llguidance: the state of an answer, and a mask of legal tokens for each row.

A `Constrainer` belongs to one engine. It has the vocabulary as bytes, made once, and the constraints that
were compiled last. Each sample has a `Matcher` of its own, a copy of the compiled one. Engines see masks
alone.

A token is *forced* if no other is legal. It is taken without a draw and without its row of logits. Any draw
would give the same token, so the text does not depend on it. If certain bytes must follow, such as a key of
JSON, the one legal token is that of the model's own tokenization of them.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from emlocal.backends.base import Backend
from emlocal.errors import EmlocalError, UsageError
from emlocal.sampling import Mask
from emlocal.settings.constraint import Constraint, check

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILED = 64
"""Number of constraints that are kept compiled."""
WHITE_SPACE = r"[ \t]{0,2}(\n[ \t]{0,40})?"
"""White space between the parts of JSON.

It is bounded, because small models can write line breaks for ever.
"""
_MOST_STATES = 50_000
"""Limit of the lexer's states, 1 to 2 kB each."""
_NOTHING = "no text meets it"
_SHOWN = 300  # characters of llguidance's message


class ConstraintError(EmlocalError):
    """An answer that cannot continue: no token is legal, or a limit of llguidance was reached."""


class Constrainer:
    """A compiler of constraints for one engine's vocabulary."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, Matcher] = OrderedDict()

    def compiled(self, constraint: Constraint) -> "Matcher":
        """Returns the state before the first token. Do not change it: `copy` it.

        Raises UsageError for an invalid constraint, one that no text meets, or one that is too large.
        """
        found = self._compiled.get(constraint)
        if found is None:
            found = self._compiled[constraint] = self._compile(constraint)
            if len(self._compiled) > COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint)
        return found

    def _compile(self, constraint: Constraint) -> "Matcher":
        check(constraint)
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=_MOST_STATES, verbose_errors=False)
        try:
            grammar = _grammar(constraint)
        except ValueError as why:
            raise _refused(constraint, str(why)) from None
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self._backend)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _refused(constraint, matcher.get_error())
        begun = Matcher(matcher, self._tokenizer)
        try:
            begun.legal()
        except ConstraintError as why:
            raise _refused(constraint, why.message) from None
        if begun.finished:
            raise _refused(constraint, "no text but the empty one meets it")
        return begun


class Matcher:
    """The progress of an answer through its constraint."""

    def __init__(self, matcher: "LLMatcher", tokenizer: "LLTokenizer") -> None:
        self._matcher, self._tokenizer = matcher, tokenizer
        self._legal: Mask | None = None  # of the next token, once it was asked for

    def copy(self) -> "Matcher":
        """Returns a copy of this state."""
        other = Matcher(self._matcher.deep_copy(), self._tokenizer)
        other._legal = self._legal
        return other

    def legal(self) -> Mask:
        """Returns the tokens that may come next, including end tokens if the answer may end.

        Raises ConstraintError if there are none, or if a limit was reached.
        """
        if self._legal is None:
            mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            if self._matcher.is_error():
                raise ConstraintError(_one_line(self._matcher.get_error()))
            if not mask.any():
                raise ConstraintError("the model has no token that may come next")
            self._legal = mask
        return self._legal

    def forced(self) -> int | None:
        """Returns the one token that is legal; None if there are more. Raises as `legal` does."""
        mask = self.legal()
        if int(np.bitwise_count(mask).sum()) != 1:
            return None
        byte = int(mask.argmax())
        return 8 * byte + int(mask[byte]).bit_length() - 1

    def take(self, token: int) -> None:
        """Takes a token, which is not an end token. Raises ConstraintError for one that is not legal."""
        self._legal = None
        if not self._matcher.consume_token(token):
            raise ConstraintError(_one_line(self._matcher.get_error()))

    @property
    def met(self) -> bool:
        """Whether the answer may end here."""
        return not self._matcher.is_error() and self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """Whether the answer must end here: the constraint is met, and nothing can follow."""
        return self.met and self._matcher.is_stopped()

    def meets(self, text: str) -> bool:
        """Returns whether the text, continuing from this state, may end there; the state is not changed."""
        tokens = self._tokenizer.greedy_tokenize(text)
        other = self._matcher.deep_copy()
        return other.try_consume_tokens(tokens) == len(tokens) and other.is_accepting()


def _grammar(constraint: Constraint) -> str:
    """Returns the constraint in llguidance's form. Raises ValueError."""
    from llguidance import LLMatcher, regex_to_lark
    from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

    text = constraint.text.strip()
    if constraint.kind == "json_schema" and text == "false":
        raise ValueError(_NOTHING)
    if constraint.kind == "json_schema":
        # overrides the schema's own options for white space and for ignored keywords
        own = {"whitespace_pattern": WHITE_SPACE, "lenient": False, "coerce_one_of": False}
        schema = "{}" if text == "true" else text
        return LLMatcher.grammar_from_json_schema(schema, overrides=own)  # type: ignore[arg-type]
    if constraint.kind == "regex":  # \d is 0 to 9, as in JSON schemas' patterns
        ascii_digits = regex_to_lark(constraint.text, "d")
        return LLMatcher.grammar_from_lark(f"start: /{ascii_digits}/")
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(constraint.text))
    except GbnfToLarkError as why:
        raise ValueError(f"it is not GBNF: {why}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


_MARK = "\x02"  # no token has it beside other characters


class _Vocabulary:
    """A vocabulary with the interface of llguidance's TokenizerWrapper."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, backend: Backend, ends: Sequence[int]) -> None:
        self.eos_token_id = ends[0] if ends else 0
        # an end token ends the answer, whatever its text; control tokens have no bytes, and are never legal
        self.tokens = [
            b"" if token in backend.info.end_tokens else backend.token_bytes(token)
            for token in range(backend.info.vocabulary)
        ]
        self._backend = backend
        self._ids = {piece: token for token, piece in reversed([*enumerate(self.tokens)]) if piece}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str | bytes) -> list[int]:
        """Returns the tokens that have these bytes, as the model tokenizes them in the middle of a text."""
        raw = text.encode() if isinstance(text, str) else bytes(text)
        said = raw.decode(errors="replace")
        for before in ("", _MARK):  # some tokenizers put a space before the first word
            tokens = self._after(before, said)
            if b"".join(self.tokens[token] for token in tokens) == raw:
                return tokens
        return self._greedy(raw)

    def _after(self, before: str, text: str) -> list[int]:
        tokens = self._backend.encode(before + text, add_special=False, parse_special=False)
        own = before.encode()
        if own:
            ends = (i for i, token in enumerate(tokens, 1) if self.tokens[token] == own)
            return tokens[next(ends, len(tokens)) :]
        return tokens

    def _greedy(self, raw: bytes) -> list[int]:
        """Returns the longest token each time; stops early if no token has the next byte."""
        tokens: list[int] = []
        start = 0
        while start < len(raw):
            pieces = (raw[start:end] for end in range(min(len(raw), start + self._longest), start, -1))
            piece = next((piece for piece in pieces if piece in self._ids), None)
            if piece is None:
                break
            tokens.append(self._ids[piece])
            start += len(piece)
        return tokens


def _tokenizer(backend: Backend) -> "LLTokenizer":
    """Returns llguidance's tokenizer of the model's vocabulary; takes 1.5 s for 151,936 tokens."""
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = sorted(backend.info.end_tokens)
    if not ends:
        raise UsageError(f"{backend.info.name} has no end token, so that no answer could be complete")
    wrapper = TokenizerWrapper(_Vocabulary(backend, ends))
    return LLTokenizer(wrapper, n_vocab=backend.info.vocabulary, eos_token=ends)


def _refused(constraint: Constraint, why: str) -> UsageError:
    return UsageError(f"{constraint.what} cannot be used: {_one_line(why)}")


def _one_line(text: str) -> str:
    """Returns llguidance's message without the parser's state, on one line."""
    line = " ".join(text.partition("<state>")[0].replace("<non-verbose/>", "").split())
    line = _NOTHING if line in ("NoExtension", "NoExtensionBias") else line
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"
