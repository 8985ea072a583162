"""The vocabulary of a GGUF model, and the tokens that end a generation, as llama.cpp sees them.

llama.cpp changes a file's token types: it knows some tokens by their text. Its corrections decide what a
prompt encodes to and where a generation stops. The rules here are those of llama_vocab::impl::load
(llama-vocab.cpp:2660-3030 of the llama.cpp in llama-cpp-python 0.3.36).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from emlocal.models.gguf.checks import DEFAULT_TOKEN_IDS
from emlocal.models.gguf.header import GGUFHeader, int_or_none

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # enum llama_token_type

IdOf = Callable[[str], int | None]
"""A function that returns the id of the token with this text, or None if there is none."""

_END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
    *("<｜end▁of▁sentence｜>", "[e~["),
)
# Fill-in-the-middle tokens that end a generation, and those that do not. llama.cpp takes one of each group.
_FIM_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
_FIM_OTHERS = {
    "fim_pre": (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
        *("<|code_prefix|>", "<|prefix|>"),
    ),
    "fim_suf": (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
        *("<|code_suffix|>", "<|suffix|>"),
    ),
    "fim_mid": (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
        *("<|code_middle|>", "<|middle|>"),
    ),
}
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss


def end_tokens(id_of: IdOf, given: Iterable[int | None] = ()) -> frozenset[int]:
    """Returns every token that ends a generation: those that the model names, and those known by text.

    `given` are ids from the model's metadata (end of sequence, of turn, of message). Of several spellings of
    one fill-in-the-middle token the first in our lists counts; llama.cpp takes any.
    """
    ids = {text: found for text in _END_TEXTS if (found := id_of(text)) is not None}
    if "<|end|>" in ids and (
        ("<|return|>" in ids and ids.keys() & {"<|call|>", "<|calls|>"})
        or ("<|flush|>" in ids and ids.keys() & {"<|call|>", "<|calls|>"})
    ):
        del ids["<|end|>"]  # gpt-oss and Solar: it ends a message, not the turn
    if "<|tool_response>" in ids:
        ids.pop("</s>", None)  # in Gemma 4 this is a word
    fim = (_first(id_of, texts) for texts in _FIM_ENDS.values())
    return frozenset(i for i in (*ids.values(), *fim, *given) if i is not None)


def _first(id_of: IdOf, texts: Iterable[str]) -> int | None:
    return next((found for text in texts if (found := id_of(text)) is not None), None)


@dataclass(frozen=True)
class Vocabulary:
    """Texts and kinds of all tokens, by id, and the ids of the special ones; None if there is none."""

    texts: list[str]
    """For "gpt2" in GPT-2's letters for bytes, for "llama" with "▁" for a space."""
    kinds: list[int]
    """NORMAL, CONTROL and so on, after llama.cpp's corrections."""
    ids: dict[str, int]
    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None
    add_bos: bool
    add_eos: bool
    end_tokens: frozenset[int]


def read_vocabulary(header: GGUFHeader, *, adds_bos: bool) -> Vocabulary:
    """Returns the vocabulary of a model that has passed `read_header`.

    Args:
        adds_bos: whether its kind of tokenizer puts BOS before a text if the file does not say.
    """
    raw = header.byte_strings("tokenizer.ggml.tokens")
    texts = [_text(token, number) for number, token in enumerate(raw)]
    ids = {text: number for number, text in enumerate(texts)}
    kinds = [NORMAL] * len(texts)
    if "tokenizer.ggml.token_type" in header.metadata:
        kinds = [int(k) for k in header.array("tokenizer.ggml.token_type")[: len(texts)]]
    defaults = DEFAULT_TOKEN_IDS.get(str(header.metadata["tokenizer.ggml.model"]), {})

    def special(name: str) -> int | None:
        given = int_or_none(header.metadata.get(f"tokenizer.ggml.{name}_token_id"))
        found = given if given is not None and 0 <= given < len(texts) else defaults.get(name)
        return found if found is not None and found < len(texts) else None

    named = {name: special(name) for name in (*_FIM_ENDS, *_FIM_OTHERS)}
    eos = special("eos")
    ends = end_tokens(ids.get, (eos, special("eot"), special("eom"), *(named[name] for name in _FIM_ENDS)))
    # A token that was found by its text is a control token, whatever the file says.
    unnamed = [spellings for name, spellings in (_FIM_ENDS | _FIM_OTHERS).items() if named[name] is None]
    controls = [_first(ids.get, spellings) for spellings in unnamed]
    controls += [ids[text] for text in _END_TEXTS if ids.get(text) in ends]
    for token in controls:
        if token is not None:
            kinds[token] = CONTROL
    for text in _ALWAYS_SHOWN:
        if text in ids:
            kinds[ids[text]] = USER_DEFINED
    if "<|end|>" in ids and ids["<|end|>"] not in ends:
        kinds[ids["<|end|>"]] = USER_DEFINED
    return Vocabulary(
        texts=texts,
        kinds=kinds,
        ids=ids,
        bos=special("bos"),
        eos=eos,
        unknown=special("unknown"),
        padding=special("padding"),
        add_bos=bool(header.metadata.get("tokenizer.ggml.add_bos_token", adds_bos)),
        add_eos=bool(header.metadata.get("tokenizer.ggml.add_eos_token", False)),
        end_tokens=ends,
    )


def _text(token: bytes, number: int) -> str:
    """Returns a token's text as C reads it: up to a NUL, and never empty."""
    text = token.partition(b"\0")[0].decode("utf-8", "backslashreplace")
    return text or f"[EMPTY_{number}]"
