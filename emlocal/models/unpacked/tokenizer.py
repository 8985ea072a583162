"""Builds, from the vocabulary in a GGUF file, a tokenizer.json that encodes exactly as llama.cpp does.

The tests compare the two on every code point, on source code, many scripts and random text. Patterns and
flags are those of llama-vocab.cpp:281-560 and 2180-2330 (llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

from emlocal.errors import ModelError
from emlocal.models.gguf.header import GGUFHeader, shown
from emlocal.models.unpacked.facts import RUN_AS_IT_IS
from emlocal.models.vocabulary import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary, read_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# After a contraction, a word and its number, Qwen's and Llama 3's patterns are the same.
_CASED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (_CASED + r"\p{N}" + _REST,)
_LLAMA3 = (_CASED + r"\p{N}{1,3}" + _REST,)
_DIGITS = (r"\p{N}", _GPT2)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

# tokenizer.ggml.pre -> the patterns that cut a text into words, one after the other.
PATTERNS = {
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4"), (_GPT2,)),
    **dict.fromkeys(("default", ""), _DEFAULT),
}
# For these, a word that is a token stays one, whatever the merges say; and BOS goes before a text.
_WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2"})
_PHI3_PLAIN = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def byte_letters() -> list[str]:
    """Returns GPT-2's letter for each of the 256 bytes: itself if visible, otherwise one from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (b for b in range(256) if b not in visible)
    letters = {b: chr(256 + n) for n, b in enumerate(hidden)}
    return [letters.get(b, chr(b)) for b in range(256)]


def build_tokenizer(header: GGUFHeader) -> tuple[Tokenizer, Vocabulary]:
    """Returns the tokenizer of a model and its vocabulary.

    Raises ModelError for a kind of tokenizer, or a vocabulary, that cannot be rebuilt exactly.
    """
    check_tokenizer(header)
    return (
        _byte_level(header) if header.metadata["tokenizer.ggml.model"] == "gpt2" else _sentencepiece(header)
    )


def check_tokenizer(header: GGUFHeader) -> None:
    """Raises ModelError for a kind of tokenizer that cannot be rebuilt; imports nothing for it."""
    kind = str(header.metadata["tokenizer.ggml.model"])
    if kind not in ("gpt2", "llama"):
        raise _refused(header, f"a tokenizer of kind {shown(kind)}", "gpt2, llama")
    pre = str(header.metadata.get("tokenizer.ggml.pre", ""))
    if kind == "gpt2" and pre not in PATTERNS:
        raise _refused(header, f"the pre-tokenizer {shown(pre)}", ", ".join(sorted(filter(None, PATTERNS))))


def _byte_level(header: GGUFHeader) -> tuple[Tokenizer, Vocabulary]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = str(header.metadata.get("tokenizer.ggml.pre", ""))
    vocabulary = read_vocabulary(header, adds_bos=pre in _WHOLE_WORDS)
    merges = list(dict.fromkeys(_merges(header)))  # of duplicates the first counts
    made = {left + right for left, right in merges}
    vocab = {
        text: number
        for number, text in enumerate(vocabulary.texts)
        if vocabulary.kinds[number] != UNUSED or text in made
    }
    lost = [(a, b) for a, b in merges if not {a, b, a + b} <= vocab.keys()]
    if lost:
        raise ModelError(
            f"{header.path.name}: {len(lost):,} of its {len(merges):,} merges involve texts that"
            " are not tokens,"
            f" such as {shown(' '.join(lost[0]))}",
            hint=RUN_AS_IT_IS,
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[pre]
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    # Both leave out a byte that is no token, but in llama.cpp its neighbours do not merge.
    missing = [letter for letter in byte_letters() if letter not in vocab]
    if missing:
        steps.append(pre_tokenizers.Split(Regex(f"[{''.join(map(re.escape, missing))}]"), "removed"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    _finish(tokenizer, vocabulary, header)
    return tokenizer, vocabulary


def _merges(header: GGUFHeader) -> Iterator[tuple[str, str]]:
    """Yields the pairs that may merge, the most urgent first."""
    if "tokenizer.ggml.merges" not in header.metadata:
        raise ModelError(f"{header.path.name} has no tokenizer.ggml.merges", hint="fetch the file again")
    for line in header.array("tokenizer.ggml.merges"):
        text = str(line)
        cut = text.find(" ", 1)
        yield (text[:cut], text[cut + 1 :]) if cut > 0 else ("", "")


def _sentencepiece(header: GGUFHeader) -> tuple[Tokenizer, Vocabulary]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = read_vocabulary(header, adds_bos=True)
    scores = [float(s) for s in header.array("tokenizer.ggml.scores")] if _has_scores(header) else []
    merges = _merges_by_score(header, vocabulary, scores or [0.0] * len(vocabulary.texts))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, byte_fallback=True))
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    if header.metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if len(steps) == 2 else [])
    )
    _finish(tokenizer, vocabulary, header)
    return tokenizer, vocabulary


def _has_scores(header: GGUFHeader) -> bool:
    return "tokenizer.ggml.scores" in header.metadata


def _merges_by_score(
    header: GGUFHeader, vocabulary: Vocabulary, scores: list[float]
) -> list[tuple[str, str]]:
    """Returns every pair of tokens whose join is a token, by the score of that token, the highest first.

    llama.cpp joins any two neighbours whose texts together are a token. Merges of BPE do the same, with two
    exceptions: neighbours that can be joined are no tokens themselves, or two joins that compete for a token
    have equal scores (llama.cpp then goes from left to right). Raises ModelError if either can happen.
    """
    ids = vocabulary.ids
    ranked: list[_Merge] = []
    for number, text in enumerate(vocabulary.texts):
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            known = (left in ids) + (right in ids)
            if known == 2:
                ranked.append(_Merge(-scores[number], left, right, number))
            elif all(len(part) == 1 or part in ids for part in (left, right)):
                raise _inexact(header, f"the token {shown(text)} has a character that is not a token")
    ranked.sort(key=lambda merge: (merge.cost, -len(merge.left), len(merge.right), merge.token))
    for _, group in groupby(ranked, key=lambda merge: merge.cost):
        _check_ties(header, list(group))
    return [(merge.left, merge.right) for merge in ranked]


class _Merge(NamedTuple):
    cost: float
    left: str
    right: str
    token: int


def _check_ties(header: GGUFHeader, group: list[_Merge]) -> None:
    """Checks tokens of one score: only runs of one character may compete, if both orders cut them alike.

    Mistral's vocabularies have runs of 2 to 16 spaces with one score. From left to right, 40 spaces become 16
    + 16 + 8, and they also do if the longest left part comes first.
    """
    begins: dict[str, list[_Merge]] = {}
    for merge in group:
        begins.setdefault(merge.left, []).append(merge)
    runs: dict[str, set[int]] = {}
    for merge in group:
        text = merge.left + merge.right
        if len(set(text)) == 1:
            runs.setdefault(text[0], set()).add(len(text))
    alike = {letter for letter, lengths in runs.items() if _runs_come_out_alike(lengths)}
    for merge in group:
        for other in begins.get(merge.right, ()):
            letters = set(merge.left + merge.right + other.right)
            if merge.token != other.token and not (len(letters) == 1 and letters <= alike):
                raise _inexact(
                    header, f"tokens {merge.token:,} and {other.token:,} have the same score and can compete"
                )


def _runs_come_out_alike(lengths: set[int]) -> bool:
    """Returns whether two orders cut every run of a letter alike.

    The orders are joining from left to right, and the longest left part first. `lengths` are those of the
    runs that are tokens. Runs up to four times the longest are tried: after a longest token, the rest is a
    shorter run again.
    """
    longest = max(lengths)
    if longest > 64:
        return False
    orders: tuple[Callable[[tuple[int, int, int]], tuple[int, ...]], ...] = (
        lambda pair: (pair[2],),
        lambda pair: (-pair[0], pair[1], pair[2]),
    )
    for length in range(2, 4 * longest + 1):
        results = []
        for order in orders:
            parts = [1] * length
            while pairs := [(a, b, at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in lengths]:
                at = min(pairs, key=order)[2]
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            results.append(parts)
        if results[0] != results[1]:
            return False
    return True


def _finish(tokenizer: Tokenizer, vocabulary: Vocabulary, header: GGUFHeader) -> None:
    """Adds the parts that both kinds have: control tokens, words that are never cut, and BOS and EOS."""
    from tokenizers import AddedToken, processors

    # llama.cpp sees from the name that Phi-3's control tokens swallow the space after them.
    name = str(header.metadata.get("general.name", "")).lower()
    phi3 = "phi-3" in name or "phi3" in name
    for number, text in enumerate(vocabulary.texts):
        kind = vocabulary.kinds[number]
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            strip = phi3 and text not in _PHI3_PLAIN
            token = AddedToken(text, special=kind != USER_DEFINED, normalized=False, rstrip=strip)
            add = tokenizer.add_tokens if kind == USER_DEFINED else tokenizer.add_special_tokens
            add([token])
    before = _name(vocabulary, vocabulary.bos if vocabulary.add_bos else None)
    after = _name(vocabulary, vocabulary.eos if vocabulary.add_eos else None)
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(text, vocabulary.ids[text]) for text in {*before, *after}],
        )


def _name(vocabulary: Vocabulary, token: int | None) -> list[str]:
    return [] if token is None else [vocabulary.texts[token]]


def _refused(header: GGUFHeader, what: str, known: str) -> ModelError:
    return ModelError(
        f"{header.path.name} has {what}; emlocal can unpack {known}",
        hint=RUN_AS_IT_IS,
    )


def _inexact(header: GGUFHeader, why: str) -> ModelError:
    return ModelError(
        f"{header.path.name}: its tokenizer cannot be unpacked exactly: {why}",
        hint=RUN_AS_IT_IS,
    )
