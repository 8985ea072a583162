"""Tokenizers built from GGUF files compared with llama.cpp's own: equal ids for equal texts."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emlocal.backends.base import LoadOptions
from emlocal.backends.llama_cpp import LlamaCppBackend
from emlocal.errors import ModelError
from emlocal.models.resolve import GGUFModel, resolve
from emlocal.models.tokenizer import Tokenizer
from emlocal.models.unpacked import unpack
from emlocal.models.unpacked.tokenizer import PATTERNS
from tests.examples import examples
from tests.tiny_architectures import architecture_metadata
from tests.tiny_gguf import (
    EMBEDDING,
    Tensor,
    Value,
    boolean,
    build,
    floats,
    ints,
    strings,
    text,
    tiny_metadata,
    tiny_tensors,
    u32,
    write_tiny_gguf,
)

PARTS = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im", "_end|>", "<s>", "</s>", "<unk>", "<0x0A>"),
    *("<reponame>", "<file_sep>", "<|fim_pad|>", "<tool_call>", "assistant", "The ", "the", "then"),
    *(" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u3000", "\u0085", "\u2028", "\u200b", "\x0b"),
    *("'s", "'LL", "'Ve", "don't", "ſ", "K", "İ", "1", "12", "12345", "3.14", "٣٤", "Ⅷ", "½", "²"),
    *(
        "é",
        "e\u0301",
        "a\u0300\u0301\u0302",
        "漢字",
        "ひらがな",
        "한국어",
        "العربية",
        "हिन्दी",
        "ไทย",
        "Ελλάδα",
    ),
    *("👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇩🇪", "\x00", "\x1b", "\x7f", "\ufffd", "\ud800", "\U000f0000", "\U0010ffff"),
    *(
        "def f(x):\n    return x+1\n",
        "{}",
        "//",
        "...",
        "=====",
        "-->",
        "$",
        "_",
        "^",
        "|",
        "`",
        "~",
        "<",
        ">",
    ),
]
SENTENCES = [
    "",
    " ",
    "Janet’s ducks lay 16 eggs per day. She eats three for breakfast, at $2 each.",
    "import numpy as np\n\n\nclass A:\n\tdef __init__(self, *, b: int = 0x1F):\n\t\tself.b = b  # …\n",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "Zażółć gęślą jaźń; Příliš žluťoučký kůň; Trần Hưng Đạo; Ђурђевак; שלום עולם",
    "你好，世界！今天是2024年1月1日。これはテストです。안녕하세요",
    "x" * 1000 + " " * 1000 + "\n" * 100,
    "-----" * 50 + "    " * 33 + "=" * 77,
    "I'M CAN'T we'LL they'd've o'clock 'tis",
]


def mixtures(count: int, seed: int = 0) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choice(PARTS) for _ in range(rng.randint(1, 10)))


class Pair:
    """One vocabulary in both tokenizers."""

    def __init__(self, model: GGUFModel, folder: Path) -> None:
        self.there = LlamaCppBackend(model, LoadOptions(context=64, sequences=1, threads=1))
        self.here = Tokenizer(folder)

    def check(self, text_: str) -> None:
        for add in (False, True):
            for parse in (False, True):
                ids = self.here.encode(text_, add_special=add, parse_special=parse)
                assert ids == self.there.encode(text_, add_special=add, parse_special=parse), (
                    text_,
                    add,
                    parse,
                )

    def check_facts(self) -> None:
        info = self.there.info
        assert self.here.vocabulary == info.vocabulary
        assert self.here.end_tokens == frozenset(info.end_tokens)
        assert (self.here.bos, self.here.eos) == (info.bos, info.eos)
        assert self.here.chat_template == info.chat_template
        assert set(self.here.control_texts()) == set(self.there.control_texts())
        differ = [t for t in range(info.vocabulary) if self.here.token_bytes(t) != self.there.token_bytes(t)]
        assert not differ


@pytest.fixture(scope="module")
def smollm2_pair(smollm2: GGUFModel, unpacked_smollm2: Path) -> Pair:
    return Pair(smollm2, unpacked_smollm2)


@pytest.mark.real
def test_smollm2_encodes_alike(smollm2_pair: Pair) -> None:
    for text_ in (*SENTENCES, *mixtures(1000)):
        smollm2_pair.check(text_)
    for path in Path(__file__).parent.glob("*.py"):
        smollm2_pair.check(path.read_text("utf-8"))


@pytest.mark.real
def test_smollm2_has_the_same_facts(smollm2_pair: Pair) -> None:
    smollm2_pair.check_facts()
    assert smollm2_pair.here.end_tokens == {0, 2, 4}
    assert "<|im_end|>" in smollm2_pair.here.control_texts()
    assert smollm2_pair.here.token_bytes(10**6) == b""


@pytest.mark.real
def test_smollm2_encodes_every_block_of_unicode_alike(smollm2_pair: Pair) -> None:
    """Tests every 37th code point. When this was written, all 1,112,064 agreed, for Qwen's vocabulary too."""
    for code in range(0, 0x110000, 37):
        letter = chr(code) if not 0xD800 <= code < 0xE000 else "\ud800"
        sample = f"x{letter} {letter}{letter}1"
        ids = smollm2_pair.here.encode(sample, add_special=True, parse_special=True)
        assert ids == smollm2_pair.there.encode(sample, add_special=True, parse_special=True), hex(code)


@pytest.mark.real
@examples(200)
@given(st.text(st.characters(), max_size=60))
def test_smollm2_encodes_any_text_alike(smollm2_pair: Pair, text_: str) -> None:
    smollm2_pair.check(text_)


def with_vocabulary(path: Path, metadata: dict[str, Value], count: int) -> GGUFModel:
    """Writes a model of one narrow layer with this vocabulary of `count` tokens."""
    rows = np.zeros((count, EMBEDDING), "<f4")
    tensors = [t for t in tiny_tensors() if t.name != "token_embd.weight"]
    path.write_bytes(
        build(metadata, [*tensors, Tensor("token_embd.weight", rows.shape[::-1], rows.tobytes())])
    )
    return resolve(str(path))


@pytest.mark.real
@pytest.mark.parametrize("pre", ["qwen2", "smollm", "llama-bpe", "gpt-2", "default", None, "smaug-bpe"])
def test_each_way_of_cutting_words(tmp_path: Path, smollm2: GGUFModel, pre: str | None) -> None:
    """Tests SmolLM2's tokens and merges with the word splitting of other models."""
    header = smollm2.header
    tokens = header.byte_strings("tokenizer.ggml.tokens")
    kinds = [int(k) for k in header.array("tokenizer.ggml.token_type")]
    metadata = tiny_metadata()
    del metadata["tokenizer.ggml.scores"], metadata["tokenizer.ggml.add_bos_token"]
    metadata |= {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.token_type": ints(
            [4 if t == b"<jupyter_code>" else k for t, k in zip(tokens, kinds, strict=True)]
        ),
        "tokenizer.ggml.merges": strings(header.byte_strings("tokenizer.ggml.merges")),
        "tokenizer.ggml.bos_token_id": u32(1),
        "tokenizer.ggml.eos_token_id": u32(2),
    }
    metadata |= {} if pre is None else {"tokenizer.ggml.pre": text(pre)}
    model = with_vocabulary(tmp_path / "tiny.gguf", metadata, len(tokens))
    pair = Pair(model, unpack(model))
    pair.check_facts()
    for text_ in (*SENTENCES, *mixtures(300), "a<jupyter_code>b"):
        pair.check(text_)


def sentencepiece(path: Path, **changes: Value) -> GGUFModel:
    """Writes a vocabulary like Mistral's: bytes, letters, words by rank, and runs of spaces.

    All runs have the same score, and one length is missing.
    """
    letters = "▁etaoinshrdlucmgxyz.,'-<>|/0A1é漢=ab"
    words = "▁t he in er on an ▁a ▁the th the ing and ▁and -- ---- === 漢é xy xyx yx abab s> </ </s>x".split()  # noqa: SIM905
    runs = ["▁" * n for n in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11)]
    tokens = ["<unk>", "<s>", "</s>", "[INST]", *(f"<0x{b:02X}>" for b in range(256))]
    kinds = [2, 3, 3, 3] + [6] * 256
    normal = list(dict.fromkeys([*runs, *words, *letters]))
    scores = [0.0] * 260 + [-1e9 if set(t) == {"▁"} else -float(n) for n, t in enumerate(normal)]
    metadata = tiny_metadata() | {
        "tokenizer.ggml.tokens": strings([*tokens, *normal]),
        "tokenizer.ggml.token_type": ints([*kinds, *[1] * len(normal)]),
        "tokenizer.ggml.scores": floats(scores),
        "tokenizer.ggml.eos_token_id": u32(2),
    }
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return with_vocabulary(path, metadata, len(tokens) + len(normal))


@pytest.fixture(scope="module", params=[{}, {"add_space_prefix": boolean(0), "add_eos_token": boolean(1)}])
def sentencepiece_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("sentencepiece")
        patch.setenv("EMLOCAL_CACHE_DIR", str(folder))
        model = sentencepiece(folder / "tiny.gguf", **request.param)
        yield Pair(model, unpack(model))


def test_sentencepiece_encodes_alike(sentencepiece_pair: Pair) -> None:
    sentencepiece_pair.check_facts()
    runs = [letter * n for letter in " -=xy▁" for n in range(1, 80)]
    runs += [f"x{r}y" for r in runs]
    runs += ["xy" * n for n in range(1, 30)] + ["xyx" * n for n in range(1, 30)]
    for text_ in (*SENTENCES, *runs, *mixtures(500)):
        sentencepiece_pair.check(text_)


@examples(300)
@given(st.text(st.sampled_from(" ▁etaoinshrxy-=<s>/é漢\n0A")) | st.text(max_size=40))
def test_sentencepiece_encodes_any_text_alike(sentencepiece_pair: Pair, text_: str) -> None:
    sentencepiece_pair.check(text_)


def test_sentencepiece_that_cannot_be_exact_is_refused(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "a", "b", "ab", "ba"]
    metadata = tiny_metadata() | {
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.token_type": ints([2, 3, 3] + [6] * 256 + [1] * 4),
        "tokenizer.ggml.scores": floats([0.0] * 259 + [-1.0, -2.0, -3.0, -3.0]),
        "tokenizer.ggml.eos_token_id": u32(2),
    }
    model = with_vocabulary(tmp_path / "ties.gguf", metadata, len(tokens))
    with pytest.raises(ModelError, match="tokens 261 and 262 have the same score and can compete"):
        unpack(model)
    tokens[260] = "c"
    metadata["tokenizer.ggml.tokens"] = strings(tokens)
    metadata["tokenizer.ggml.scores"] = floats([-float(n) for n in range(len(tokens))])
    model = with_vocabulary(tmp_path / "letters.gguf", metadata, len(tokens))
    with pytest.raises(ModelError, match="the token ab has a character that is not a token"):
        unpack(model)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    metadata = architecture_metadata("llama")
    for changes, message in (
        (
            {"pre": text("tekken")},
            r"tiny\.gguf has the pre-tokenizer tekken; emlocal can unpack codeshell, .*qwen2",
        ),
        ({"model": text("rwkv")}, r"tiny\.gguf has a tokenizer of kind rwkv; emlocal can unpack gpt2, llama"),
        (
            {"merges": strings(["t h", "q zz"])},
            r"1 of its 2 merges involve texts that are not tokens, such as q zz",
        ),
    ):
        changed = metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
        path = tmp_path / "tiny.gguf"
        path.write_bytes(build(changed, tiny_tensors()))
        with pytest.raises(ModelError, match=message):
            unpack(resolve(str(path)))
    assert {"qwen2", "smollm", "llama-bpe", "gpt-2", "default"} <= PATTERNS.keys()


def test_folders_of_others(tmp_path: Path) -> None:
    """Tests tokens written as tables, several templates, and padding and truncation that must not apply."""
    source = unpack(resolve(str(write_tiny_gguf(tmp_path / "tiny.gguf"))))
    folder = tmp_path / "folder"
    folder.mkdir()
    fast = json.loads((source / "tokenizer.json").read_text("utf-8"))
    fast["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(fast), "utf-8")
    (folder / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": [7, 8]}))
    own = {
        "bos_token": {"content": "<s>", "special": True},
        "eos_token": None,
        "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    tokenizer = Tokenizer(folder)
    assert len(tokenizer.encode("the thing in the end", add_special=True, parse_special=False)) > 4
    assert (tokenizer.bos, tokenizer.eos, tokenizer.chat_template, tokenizer.vocabulary) == (
        "<s>",
        "",
        "D",
        512,
    )
    known = {tokenizer.encode(t, add_special=False, parse_special=True)[-1] for t in ("</s>", "<|im_end|>")}
    assert tokenizer.end_tokens == known | {7, 8}
    assert tokenizer.token_bytes(500) == b""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("config.json", "[]", "is not a JSON table"),
        ("config.json", "{}", "does not say its vocab_size"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer.json", "{}", "is not a usable tokenizer"),
    ],
)
def test_broken_folders(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    source = unpack(resolve(str(write_tiny_gguf(tmp_path / "tiny.gguf"))))
    if content is None:
        (source / name).unlink()
    else:
        (source / name).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        use(source)
    assert "\n" not in caught.value.message


def use(folder: Path) -> int:
    tokenizer = Tokenizer(folder)
    tokenizer.encode("a", add_special=True, parse_special=True)
    return tokenizer.vocabulary
