"""Checks that a sound GGUF file must pass before llama.cpp may load it as a language model.

llama.cpp answers most nonsense with an error. Some of it leads to an assertion that ends the process, an
uncaught exception in a C function, or a null function pointer. Each check here names the fault that it guards
against; the checks of the architecture's own keys are in `keys`. Line numbers are of the llama.cpp vendored
in llama-cpp-python 0.3.36. Tests load the files that pass here with the real library
(tests/models/gguf/test_fuzz.py and tests/attack/test_gguf.py). docs/models.md lists what a header cannot
show.
"""

import re
from collections import Counter

from emlocal.errors import ModelError
from emlocal.models.gguf import types
from emlocal.models.gguf.header import ArrayRef, GGUFHeader, int_or_none, shown, unusable
from emlocal.models.gguf.keys import check_keys

MAX_TEMPLATE_BYTES = 1 << 20  # the longest template in the catalog has 12 kB

# Architectures that read text but write none.
ENCODERS = frozenset(
    "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert "  # noqa: SIM905
    "gemma-embedding llama-embed t5 t5encoder wavtokenizer-dec".split()
)
# The tokenizers of models that write text. llama.cpp's other tokenizers are for encoders. One of them (t5)
# follows offsets that the file gives, so none of them is let through.
TOKENIZERS = frozenset({"llama", "gpt2", "gemma4", "rwkv", "plamo2"})
# Defaults for ids that the file does not give; llama-vocab.cpp:1960-2040.
DEFAULT_TOKEN_IDS = {
    "llama": {"bos": 1, "eos": 2},
    "plamo2": {"bos": 1, "eos": 2},
    "gpt2": {"bos": 11, "eos": 11},
}

_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_BYTE_TOKEN = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
_VECTORS = re.compile(r"(_norm\.weight|rope_freqs\.weight|rope_factors_(long|short)\.weight|scale)$")
_TOKEN_BYTE = 6  # LLAMA_TOKEN_TYPE_BYTE


def check_language_model(header: GGUFHeader) -> None:
    """Raises ModelError, in one line with the numbers, if llama.cpp cannot be trusted with this model.

    `check_tokens` checks the tokens themselves.
    """
    _check_kind(header)
    check_keys(header)
    _check_weights(header)
    _check_vocabulary(header)


def _check_kind(header: GGUFHeader) -> None:
    """Checks that it is a model that writes text, not one of the other things kept in GGUF files."""
    kind, architecture = header.metadata.get("general.type", "model"), header.architecture
    if kind == "adapter":
        raise ModelError(
            f"{header.path.name} is a LoRA adapter, not a model",
            hint=f"name its base model too: --model BASE --adapter {header.path}",
        )
    if kind == "mmproj" or architecture == "clip":
        raise ModelError(
            f"{header.path.name} is the image projector of a model, not the model",
            hint="use the other .gguf file of the same repository",
        )
    if header.value_types.get("general.architecture") != types.STRING:
        raise unusable(header.path, "it does not say its general.architecture")
    if not _ARCHITECTURE.fullmatch(architecture):
        raise unusable(header.path, f'its general.architecture is "{shown(architecture)}"')
    if kind != "model" or architecture in ENCODERS:
        what = (
            f"of kind {shown(str(kind))}"
            if kind != "model"
            else f"a {architecture} model, which does not write text"
        )
        raise ModelError(
            f"{header.path.name} is {what}", hint="list the models that emlocal knows: emlocal models list"
        )
    if not header.tensors:
        raise unusable(header.path, "it has no tensors")


def _check_weights(header: GGUFHeader) -> None:
    """Checks the types of the weights.

    ggml's kernels add and multiply vectors in F32 only, and abort on other types.
    """
    for tensor in header.tensors.values():
        vector = len(tensor.shape) == 1 or _VECTORS.search(tensor.name) is not None
        # Hash routing tables contain indices and are I32 on purpose.
        if (vector and tensor.type != "F32") or (
            tensor.type not in types.WEIGHT_TYPES and "tid2eid" not in tensor.name
        ):
            want = "F32" if vector else "a type llama.cpp can multiply with"
            raise unusable(header.path, f"tensor {shown(tensor.name)} is of type {tensor.type}, not {want}")
    _check_scales(header)
    if header.architecture == "phi3":
        _check_queries(header)


def _check_scales(header: GGUFHeader) -> None:
    """Checks the scales of NVFP4 matrices, which llama-model.cpp:1798 and llama-graph.cpp:1793 assert."""
    for tensor in header.tensors.values():
        stem = tensor.name.removesuffix(".weight")
        scaled = {f"{stem}.scale", f"{stem}.input_scale"} & header.tensors.keys()
        if tensor.type != "NVFP4" or not scaled:
            continue
        if f"{stem}.bias" in header.tensors:
            raise unusable(header.path, f"tensor {shown(tensor.name)} has a scale and a bias")
    tied = "output.weight" not in header.tensors and header.tensors["token_embd.weight"].type == "NVFP4"
    if tied and {"output.scale", "output.input_scale"} & header.tensors.keys():
        raise unusable(header.path, "it has a scale for output.weight, but no output.weight")


def _check_queries(header: GGUFHeader) -> None:
    """Checks that phi3 has Q, K and V.

    Its loader demands neither form, and its graph would follow a null pointer.
    """
    for layer in range(header.block_count):
        names = {f"blk.{layer}.attn_{part}.weight" for part in "qkv"}
        if f"blk.{layer}.attn_qkv.weight" not in header.tensors and not names <= header.tensors.keys():
            raise unusable(header.path, f"layer {layer} has no attn_qkv.weight")


def _check_vocabulary(header: GGUFHeader) -> None:
    tokenizer = header.metadata.get("tokenizer.ggml.model")
    if tokenizer not in TOKENIZERS:
        said = "has no tokenizer" if tokenizer is None else f"has a tokenizer of kind {shown(str(tokenizer))}"
        raise unusable(header.path, f"it {said}; emlocal needs one of {', '.join(sorted(TOKENIZERS))}")
    for template in (header.chat_template or "", header.tool_template or ""):
        if len(template) > MAX_TEMPLATE_BYTES:
            raise unusable(header.path, f"its chat template has {len(template):,} characters")
    _array_length(header, "tokens", types.STRING)
    count = header.vocab_size
    for name, allowed in (("scores", (types.FLOAT32, types.INT32)), ("token_type", (types.INT32,))):
        length = _array_length(header, name, *allowed)
        if length is not None and length < count:
            raise unusable(header.path, f"it has {count:,} tokens but {length:,} tokenizer.ggml.{name}")
    _array_length(header, "merges", types.STRING)
    _check_special_ids(header, str(tokenizer), count)


def _array_length(header: GGUFHeader, name: str, *element_types: int) -> int | None:
    """Returns the length of the array tokenizer.ggml.NAME; None if there is no such key.

    Its elements must be of one of the types.
    """
    key = f"tokenizer.ggml.{name}"
    value = header.metadata.get(key)
    if value is None:
        return None
    if isinstance(value, ArrayRef) and value.element_type in element_types:
        return value.length
    # A short array of numbers is already decoded. llama.cpp refuses a wrong width with an error.
    if isinstance(value, tuple) and types.STRING not in element_types:
        return len(value)
    wanted = " or ".join(types.VALUE_TYPE_NAMES[t] for t in element_types)
    raise unusable(header.path, f"{key} is not an array of {wanted}")


def _check_special_ids(header: GGUFHeader, tokenizer: str, count: int) -> None:
    """Checks that a token added to every text is in the vocabulary: llama-vocab.cpp:3443 asserts it.

    llama.cpp ignores an id outside the vocabulary and takes its default, so that alone is no fault.
    """
    always_bos = tokenizer in {"llama", "plamo2", "gemma4"}
    for name, default_add in (("bos", always_bos), ("eos", False)):
        given = int_or_none(header.metadata.get(f"tokenizer.ggml.{name}_token_id"))
        valid = given is not None and 0 <= given < count
        id_ = given if valid else DEFAULT_TOKEN_IDS.get(tokenizer, {}).get(name)
        added = header.metadata.get(f"tokenizer.ggml.add_{name}_token", default_add)
        if added and (id_ is None or id_ >= count):
            raise unusable(
                header.path, f"tokenizer.ggml.{name}_token_id is {given} in a vocabulary of {count:,} tokens"
            )


def check_tokens(header: GGUFHeader, data: bytearray) -> None:
    """Checks that tokens differ (llama-vocab.cpp:2544 asserts it), and that byte tokens have their form.

    `data`: the bytes of the header. For a header that passed `check_language_model`, this reads no other
    bytes.
    """
    tokenizer = header.metadata["tokenizer.ggml.model"]
    tokens = header.byte_strings("tokenizer.ggml.tokens", data)
    known = set(tokens)
    # llama.cpp has C strings here, and names for the empty ones
    if b"" in known or b"\0" in b"".join(tokens):
        texts = [t.partition(b"\0")[0] for t in tokens]
        tokens = [t or b"[EMPTY_%d]" % i for i, t in enumerate(texts)]
        known = set(tokens)
    if len(known) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise unusable(header.path, f"the token {shown(twice)} appears twice in its vocabulary")
    if tokenizer in {"llama", "plamo2", "gemma4"} and "tokenizer.ggml.token_type" in header.metadata:
        kinds = header.array("tokenizer.ggml.token_type", data)
        for token, kind in zip(tokens, kinds, strict=False):
            if kind == _TOKEN_BYTE and not _BYTE_TOKEN.fullmatch(token):
                raise unusable(
                    header.path, f"the token {shown(token)} is marked as a byte but is not of the form <0x41>"
                )
    if tokenizer in {"llama", "plamo2"}:
        # byte_to_token() throws for a byte without a token, out of llama_tokenize(), which ends the process.
        for byte in range(256):
            if b"<0x%02X>" % byte not in known and bytes([byte]) not in known:
                raise unusable(
                    header.path, f"its vocabulary has no token <0x{byte:02X}>, so it cannot encode any text"
                )
