"""Prompts of megabytes: refused by size or tokenized in linear time, while signals still work."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emlocal.backends.base import Backend, LoadOptions
from emlocal.backends.fake import FakeBackend
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.backends.llama_cpp.long_text import TokenTexts, join_pieces
from emlocal.batch.lines import read_lines
from emlocal.cancel import unfinished, waited_for
from emlocal.errors import CancelledError, ContextFullError
from emlocal.generation import prompt
from emlocal.generation.prompt import chat_tokens, text_tokens
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.models.tokenizer import _MOST_SHRINKING, Tokenizer
from emlocal.models.vocabulary import USER_DEFINED
from emlocal.text import longest_of
from tests.batch.batches import batch_on, settings
from tests.tiny_gguf import (
    EMBEDDING,
    TOKEN_TYPES,
    TOKENS,
    Tensor,
    build,
    floats,
    ints,
    strings,
    tiny_metadata,
    tiny_tensors,
    u32,
    write_tiny_gguf,
)

NAMES = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<unk>", "<s>"]
BITS = [
    *NAMES,
    "y",
    "é",
    "日",
    "\n",
    "\n\n",
    " ",
    "  ",
    "the cat",
    "<|im_",
    "<",
    "end|>",
    "don't",
    "😀",
    "▁",
    "x" * 30,
]
BITS += ["e\u0301", "123456", "\t", "<0x79>", "\u212a", "\u1fef", "İ", "\ud800"]


def texts(seed: int, count: int, most: int = 150) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(BITS) for _ in range(rng.randrange(1, most)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppBackend]:
    path = write_tiny_gguf(tmp_path_factory.mktemp("long") / "tiny.gguf", llama__context_length=u32(2048))
    backend = LlamaCppBackend(resolve(str(path)), LoadOptions(context=100, sequences=4))
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def real(smollm2: GGUFModel) -> Iterator[LlamaCppBackend]:
    backend = LlamaCppBackend(smollm2, LoadOptions(context=512))
    yield backend
    backend.close()


@pytest.mark.parametrize("engine", ["tiny", pytest.param("real", marks=pytest.mark.real)])
def test_pieces_give_the_tokens_of_the_whole(
    engine: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emlocal.backends.llama_cpp.long_text._PIECE", 30)
    backend: LlamaCppBackend = request.getfixturevalue(engine)
    known: TokenTexts = backend._token_texts()
    cuts = 0
    for text in texts(1, 300):
        for parse in (True, False):
            pieces = list(known.pieces(text, parse))
            cuts += len(pieces) - 1
            for add in (True, False):
                whole = backend._encode(text, add, parse)
                assert join_pieces(backend._encode, iter(pieces), add, parse) == whole
    assert cuts > 1000


def test_names_that_overlap_are_cut_only_where_llama_cpp_parts_them(tmp_path: Path) -> None:
    """In "abcd" with the names "ab" and "bcd", the longest is taken first, and "a" stays text."""
    from emlocal.models.resolve import resolve

    names = ["ab", "bcd", "aa", "aaaa", "xyx", "<|im_end|>ab"]
    at = TOKENS.index("<|im_start|>")
    tokens = [*TOKENS[:at], *names, *TOKENS[at:]]
    kinds = [*TOKEN_TYPES[:at], *[USER_DEFINED] * len(names), *TOKEN_TYPES[at:]]
    scores = floats([-float(i) for i in range(len(tokens))])
    metadata = tiny_metadata() | {
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": ints(kinds),
        "tokenizer.ggml.eos_token_id": u32(len(tokens) - 1),
    }
    rows = np.zeros((len(tokens), EMBEDDING), "<f4")
    tensors = [Tensor("token_embd.weight", rows.shape[::-1], rows.tobytes()), *tiny_tensors()[1:]]
    path = tmp_path / "names.gguf"
    path.write_bytes(build(metadata, tensors))
    backend = LlamaCppBackend(resolve(str(path)), LoadOptions(context=64))
    known, rng = backend._token_texts(), random.Random(3)
    for _ in range(400):
        text = "".join(
            rng.choice(["a", "b", "cd", "x", "y", "xy", " ", "q", "<|im_end|>", "aa"]) for _ in range(60)
        )
        for parse in (True, False):
            pieces = [(at, again) for at, again in known._cuts(text, parse)]
            whole = backend._encode(text, False, parse)
            for at, again in pieces:
                head = backend._encode(text[:at], False, parse)
                skip = len(backend._encode(again, False, parse)) if again else 0
                assert head + backend._encode(again + text[at:], False, parse)[skip:] == whole
    backend.close()


def test_many_names_and_bytes_cost_linear_time(
    tiny: LlamaCppBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts calls instead of seconds: none sees more than a few thousand characters."""
    longest = 0
    native = LlamaCppBackend._encode

    def watched(self: LlamaCppBackend, text: str, add_special: bool, parse_special: bool) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return native(self, text, add_special, parse_special)

    monkeypatch.setattr(LlamaCppBackend, "_encode", watched)
    for text in ("<|im_end|>" * 30_000, "y" * 300_000, "\n" * 300_000, "日本" * 100_000):
        longest = 0
        tokens = tiny.encode(text, add_special=True, parse_special=True)
        assert len(tokens) > 30_000
        assert longest < 5_000


@pytest.mark.parametrize("engine", ["tiny", pytest.param("real", marks=pytest.mark.real)])
def test_the_bound_never_exceeds_the_tokens(engine: str, request: pytest.FixtureRequest) -> None:
    backend: Backend = request.getfixturevalue(engine)
    densest = [token for token in range(backend.info.vocabulary) if len(backend.token_bytes(token)) > 8][:50]
    for text in [*texts(2, 200), *(backend.token_bytes(t).decode(errors="ignore") * 50 for t in densest)]:
        least = backend.least_tokens(text)
        assert 0 <= least <= len(backend.encode(text, add_special=False, parse_special=True))
    assert backend.least_tokens("y" * 1_000_000) > 1_000


@pytest.mark.parametrize(
    "folder", ["unpacked_tiny", pytest.param("unpacked_smollm2", marks=pytest.mark.real)]
)
def test_the_bound_of_a_folders_tokenizer(folder: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer(request.getfixturevalue(folder))
    for text in texts(4, 200):
        assert tokenizer.least_tokens(text) <= len(
            tokenizer.encode(text, add_special=False, parse_special=True)
        )
    if tokenizer._longest is not None:
        assert tokenizer.least_tokens("y" * 1_000_000) > 1_000
    long = "the cat " * 5_000
    assert (
        tokenizer.encode(long, add_special=False, parse_special=True)[:50]
        == tokenizer.encode(long[:8000], add_special=False, parse_special=True)[:50]
    )


def test_nfc_shrinks_no_text_more_than_the_bound_allows() -> None:
    def size(text: str) -> int:
        return len(text.encode())

    characters = [chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000]  # there are none beyond
    apart = {c: unicodedata.normalize("NFD", c) for c in characters}
    spelt: dict[str, int] = {}  # the longest decomposition of each character that no other character composes
    for character, parts in apart.items():
        if len(parts) == 1:
            spelt[parts] = max(spelt.get(parts, 0), size(character))
    worst = max(
        sum(spelt.get(part, size(part)) for part in apart[c]) / size(c)
        for c in characters
        if unicodedata.normalize("NFC", c) == c
    )
    assert 3 < worst <= _MOST_SHRINKING


def test_what_cannot_fit_is_refused_with_the_numbers_and_not_tokenized(
    tiny: LlamaCppBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> list[int]:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(tiny, "_encode", never)
    said = r"the prompt has [\d,]{9,} bytes, at least [\d,]{6,} tokens; the context holds 100,"
    for text in ("y" * 2_000_000, "<|im_end|>" * 200_000):
        with pytest.raises(ContextFullError, match=said):
            text_tokens(tiny, text, add_special=True, parse_special=True)
        with pytest.raises(ContextFullError, match=said):
            chat_tokens(tiny, [{"role": "user", "content": text}])


def test_what_the_template_leaves_out_does_not_count() -> None:
    fake = FakeBackend(context=100)
    object.__setattr__(fake.info, "chat_template", "{{ messages[-1].content | trim }}")
    thoughts = {"role": "assistant", "content": "hm " * 400_000}
    assert bytes(chat_tokens(fake, [thoughts, {"role": "user", "content": "hi" + " " * 100_000}])) == b"hi"
    with pytest.raises(ContextFullError, match="has 100,000 bytes, at least 100,000 tokens"):
        chat_tokens(fake, [thoughts, {"role": "user", "content": "h" * 100_000}])


def test_a_long_conversation_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checked text is the one that is tokenized; only control tokens' names need a second rendering."""
    fake, asked = FakeBackend(context=1_000_000), []
    object.__setattr__(fake.info, "chat_template", "{{ messages[-1].content }}")
    real = prompt.render
    monkeypatch.setattr(prompt, "render", lambda *a, **b: (asked.append(a), real(*a, **b))[1])
    text = "word " * 10_000
    assert bytes(chat_tokens(fake, [{"role": "user", "content": text}])).decode() == text
    assert len(asked) == 1


@pytest.mark.real
def test_names_in_a_long_message_are_still_mere_text(smollm2: GGUFModel) -> None:
    backend = LlamaCppBackend(smollm2, LoadOptions(context=8192))
    end = backend.encode("<|im_end|>", add_special=False, parse_special=True)[0]
    plain = chat_tokens(backend, [{"role": "user", "content": "hi"}])
    long = chat_tokens(backend, [{"role": "user", "content": "hello <|im_end|> " * 1_500}])
    assert long.count(end) == plain.count(end)
    assert len(long) > 6 * 1_500  # each name is spelt out
    backend.close()


@pytest.mark.parametrize("mib", [6, pytest.param(63, marks=pytest.mark.attack)])
def test_a_line_of_megabytes_becomes_an_error_row_and_the_next_is_answered(
    tiny: LlamaCppBackend, mib: int
) -> None:
    long = [
        json.dumps({"prompt": "y" * (mib << 20)}),
        json.dumps({"prompt": "<|im_end|>" * 1_000_000, "raw": True}),
    ]
    lines = [*long, json.dumps({"prompt": "e", "max_tokens": 2})]
    batch = batch_on(tiny, read_lines(io.BytesIO("\n".join(lines).encode())), settings(), 1)
    first, second, third = batch.rows()
    assert f"has {mib << 20:,}"[:7] in first["error"]  # the template adds a few
    assert "the context holds 100" in first["error"]
    assert "has 10,000,000 bytes" in second["error"]
    assert "error" not in third


def test_a_dry_run_counts_it_as_one_that_does_not_fit(tiny: LlamaCppBackend) -> None:
    from emlocal.batch.forecast import Speed, survey

    line = json.dumps({"prompt": "y" * 1_000_000}).encode()
    found = survey(tiny, read_lines(io.BytesIO(line)), settings(), speed=Speed(1, 10.0))
    assert (found.refused, found.bad_lines) == (1, 0)


def test_work_that_hears_no_signals_is_waited_for() -> None:
    assert waited_for(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        waited_for(lambda: 1 // 0)
    assert not unfinished()
    asked = iter([False, True])
    with pytest.raises(CancelledError):
        waited_for(lambda: time.sleep(0.5), lambda: next(asked))
    assert unfinished()
    while unfinished():
        time.sleep(0.01)


SLOW = """
import sys, time
from emlocal.backends.fake import FakeBackend
from emlocal.cli import options
from emlocal.cli.app import run
from emlocal import __main__
import contextlib

class Slow(FakeBackend):
    def encode(self, text, *, add_special, parse_special):
        print("tokenizing", file=sys.stderr, flush=True)
        time.sleep(600)

@contextlib.contextmanager
def opened(options, **_):
    yield Slow(context=100_000_000)

options.open_backend = opened
sys.argv = ["emlocal", *sys.argv[1:]]
__main__.main()
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_signals_end_the_program_while_a_text_is_tokenized(
    tmp_path: Path, sent: signal.Signals, code: int, command: str
) -> None:
    text = tmp_path / "long.txt"
    text.write_text("x" * 100_000)
    arguments = ["generate", "-f", str(text), "-q"] if command == "generate" else ["chat", "-q"]
    environment = {**os.environ, "EMLOCAL_DATA_DIR": str(tmp_path), "EMLOCAL_CONFIG_DIR": str(tmp_path)}
    with (
        text.open("rb") as stdin,
        subprocess.Popen(
            [sys.executable, "-c", SLOW, *arguments], stdin=stdin, stderr=subprocess.PIPE, env=environment
        ) as process,
    ):
        assert process.stderr is not None
        try:
            assert b"tokenizing" in process.stderr.readline()
            process.send_signal(sent)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()  # it would sleep for ten minutes
    if command == "chat" and sent == signal.SIGINT:  # the answer stops, and the input has ended
        assert b"stopped before the first token" in said
        code = 0
    assert process.returncode == code
    assert b"Traceback" not in said


def test_a_pattern_of_many_texts_finds_the_longest() -> None:
    rng = random.Random(5)
    known = list({"".join(rng.choice("ab<|") for _ in range(rng.randrange(1, 6))) for _ in range(60)})
    slow = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))))
    quick = re.compile(longest_of(known))
    for _ in range(300):
        text = "".join(rng.choice("ab<|x") for _ in range(40))
        assert quick.findall(text) == slow.findall(text)
    assert re.compile(longest_of([])).search("abc") is None
