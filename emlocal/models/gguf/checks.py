"""What a sound GGUF file must also be before llama.cpp may load it as a language model.

llama.cpp answers most nonsense with an error, but some of it with an assertion that ends the process, an
uncaught exception in a C function, or a null function pointer. Each check here names what it guards against;
the line numbers are of the llama.cpp vendored in llama-cpp-python 0.3.36. tests/models/gguf/test_fuzz.py
loads what passes here with the real library. docs/models.md lists what a header cannot show.
"""

import re
from collections import Counter
from itertools import zip_longest
from math import inf, isinf, isnan

from emlocal.errors import ModelError
from emlocal.models.gguf import types
from emlocal.models.gguf.header import ArrayRef, GGUFHeader, int_or_none, shown, unusable

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS; llama-model.cpp:1328 asserts it
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS; llama-model.cpp:1361
MAX_EMBEDDING = 1 << 20
MAX_CONTEXT = (1 << 31) - 1  # positions are int32
MAX_TEMPLATE_BYTES = 1 << 20  # the longest template in the catalog has 12 kB

# Have no attention heads, so a head count of 0 is honest.
RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
# Read text but write none.
ENCODERS = frozenset(
    "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert "  # noqa: SIM905
    "gemma-embedding llama-embed t5 t5encoder wavtokenizer-dec".split()
)
# Their graphs assert key size = value size = rotated size (src/models/*.cpp: n_embd_head == n_rot).
UNIFORM_HEADS = frozenset(
    "llama llama4 qwen2 qwen2moe qwen3 qwen3moe smollm3 mistral3 granite olmo olmo2 olmoe "  # noqa: SIM905
    "exaone starcoder2 internlm2 baichuan orion xverse deci ernie4_5 apertus".split()
)
# The tokenizers of models that write text. The others llama.cpp has are for encoders; one of them (t5)
# follows offsets that the file gives, so none is let through.
TOKENIZERS = frozenset({"llama", "gpt2", "gemma4", "rwkv", "plamo2"})
ROPE_SCALINGS = frozenset({"none", "linear", "yarn", "longrope"})
# Of an id that is not given; llama-vocab.cpp:1960-2040.
DEFAULT_TOKEN_IDS = {
    "llama": {"bos": 1, "eos": 2},
    "plamo2": {"bos": 1, "eos": 2},
    "gpt2": {"bos": 11, "eos": 11},
}

_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_BYTE_TOKEN = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
# Vectors that are added to or multiplied with F32 rows; ggml's kernels abort on any other type.
_VECTORS = re.compile(r"(_norm\.weight|rope_freqs\.weight|rope_factors_(long|short)\.weight)$")
_TOKEN_BYTE = 6  # LLAMA_TOKEN_TYPE_BYTE


def check_language_model(header: GGUFHeader) -> None:
    """Raise ModelError, in one line with the numbers, if llama.cpp cannot be trusted with this model.

    The tokens themselves are left to `check_tokens`.
    """
    _check_kind(header)
    _check_sizes(header)
    _check_heads(header)
    _check_experts(header)
    _check_floats(header)
    _check_weights(header)
    _check_vocabulary(header)


def _check_kind(header: GGUFHeader) -> None:
    """It must be a model that writes text, not one of the other things kept in GGUF files."""
    kind, architecture = header.metadata.get("general.type", "model"), header.architecture
    if kind == "adapter":
        raise ModelError(
            f"{header.path.name} is a LoRA adapter, not a model",
            hint=f"give it beside its base model: --model BASE --adapter {header.path}",
        )
    if kind == "mmproj" or architecture == "clip":
        raise ModelError(
            f"{header.path.name} is the image projector of a model, not the model",
            hint="give the other .gguf file of the same repository",
        )
    if header.value_types.get("general.architecture") != types.STRING:
        raise unusable(header.path, "it does not say its general.architecture")
    if not _ARCHITECTURE.fullmatch(architecture):
        raise unusable(header.path, f'its general.architecture is "{shown(architecture)}"')
    if kind != "model" or architecture in ENCODERS:
        what = (
            f"of kind {shown(str(kind))}"
            if kind != "model"
            else f"a {architecture} model, which writes no text"
        )
        raise ModelError(
            f"{header.path.name} is {what}", hint="see the models emlocal knows: emlocal models list"
        )
    if not header.tensors:
        raise unusable(header.path, "it has no tensors")


def _in_range(header: GGUFHeader, name: str, low: int, high: int, *, required: bool = False) -> int | None:
    """The architecture's own whole number `name`, within its bounds; None if absent and not required."""
    value = header.value(name)
    if value is None and not required:
        return None
    number = int_or_none(value)
    if number is None or not low <= number <= high:
        said = "missing" if value is None else shown(str(value))
        raise unusable(
            header.path, f"{header.architecture}.{name} is {said}, not a number in {low:,} to {high:,}"
        )
    return number


def _check_sizes(header: GGUFHeader) -> None:
    layers = _in_range(header, "block_count", 1, MAX_LAYERS, required=True) or 0
    _in_range(header, "nextn_predict_layers", 0, layers - 1)
    _in_range(header, "context_length", 1, MAX_CONTEXT, required=True)
    embedding = _in_range(header, "embedding_length", 1, MAX_EMBEDDING, required=True)
    rows = header.tensors.get("token_embd.weight")
    if rows is None or len(rows.shape) != 2:
        raise unusable(header.path, "it has no token_embd.weight of two dimensions")
    if rows.shape != (embedding, header.vocab_size):
        raise unusable(
            header.path,
            f"token_embd.weight has {rows.shape[1]:,} rows of {rows.shape[0]:,}; "
            f"the metadata say {header.vocab_size:,} tokens and embedding_length {embedding:,}",
        )
    for name in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        value = header.value(name)
        if isinstance(value, ArrayRef) or (isinstance(value, tuple) and len(value) != layers):
            length = value.length if isinstance(value, ArrayRef) else len(value)
            raise unusable(header.path, f"{name} has {length:,} elements for {layers:,} layers")


def _check_heads(header: GGUFHeader) -> None:
    """ggml asserts that query heads are a multiple of key heads and that rotated sizes are even and fit.

    A rotated size of 0 makes its kernel run for ever.
    """
    architecture, embedding = header.architecture, header.embedding_length
    heads, heads_kv = header.head_count, header.head_count_kv
    if architecture not in RECURRENT and not any(heads):
        raise unusable(header.path, "attention.head_count is 0")
    for layer, (q, kv) in enumerate(zip_longest(heads, heads_kv, fillvalue=0)):
        if not 0 <= q <= embedding or not 0 <= kv <= q or (kv and q % kv):
            raise unusable(header.path, f"layer {layer} has {q:,} attention heads for {kv:,} key-value heads")
    if architecture in RECURRENT:
        return
    head_size = embedding // (heads[0] or max(heads))
    keys = _in_range(header, "attention.key_length", 1, MAX_EMBEDDING) or head_size
    values = _in_range(header, "attention.value_length", 1, MAX_EMBEDDING) or head_size
    rotated = _in_range(header, "rope.dimension_count", 2, keys)
    if (keys if rotated is None else rotated) % 2 and architecture != "gpt2":
        raise unusable(header.path, f"rope.dimension_count is {rotated or keys}, an odd number")
    if architecture in UNIFORM_HEADS and not keys == values == (keys if rotated is None else rotated):
        raise unusable(
            header.path,
            f"attention heads have keys of {keys}, values of {values} and rotate {rotated}; "
            f"{architecture} models need one size",
        )


def _check_experts(header: GGUFHeader) -> None:
    """llama-model.cpp:1361-1374 asserts all of these."""
    count = _in_range(header, "expert_count", 0, MAX_EXPERTS) or 0
    used = header.per_layer("expert_used_count") or (0,)
    groups = _in_range(header, "expert_group_count", 0, MAX_EXPERTS) or 0
    groups_used = _in_range(header, "expert_group_used_count", 0, MAX_EXPERTS) or 0
    whole = count == 0 and max(used) == 0 and groups == 0
    routed = 0 < max(used) <= count and min(used) >= 0 and groups < count
    grouped = groups <= 1 or (count % groups == 0 and 0 < groups_used < groups)
    if not (whole or (routed and grouped)):
        raise unusable(
            header.path,
            f"of its {count:,} experts {max(used):,} are used, in {groups_used:,} of {groups:,} groups",
        )


def _check_floats(header: GGUFHeader) -> None:
    """A negative or infinite epsilon fails an assertion in the norms; NaN anywhere makes NaN logits."""
    prefix = f"{header.architecture}."
    for key, value in header.metadata.items():
        if not key.startswith(prefix):
            continue
        for number in value if isinstance(value, tuple) else (value,):
            nan = isinstance(number, float) and isnan(number)
            infinite = isinstance(number, float) and isinf(number) and key.startswith(f"{prefix}rope.")
            epsilon = key.endswith("epsilon") and not (isinstance(number, float) and 0 <= number < inf)
            if nan or infinite or epsilon:
                raise unusable(header.path, f"{shown(key)} is {shown(str(number))}")
    scaling = header.value("rope.scaling.type")
    if scaling is not None and scaling not in ROPE_SCALINGS:
        raise unusable(
            header.path, f"rope.scaling.type is {shown(str(scaling))}, which llama.cpp does not know"
        )


def _check_weights(header: GGUFHeader) -> None:
    for tensor in header.tensors.values():
        bias = tensor.name.endswith(".bias") and len(tensor.shape) == 1
        vector = bias or _VECTORS.search(tensor.name) is not None
        # Hash routing tables hold indices and are made of I32 on purpose.
        if (vector and tensor.type != "F32") or (
            tensor.type not in types.WEIGHT_TYPES and "tid2eid" not in tensor.name
        ):
            want = "F32" if vector else "a type llama.cpp can multiply with"
            raise unusable(header.path, f"tensor {shown(tensor.name)} is of type {tensor.type}, not {want}")


def _check_vocabulary(header: GGUFHeader) -> None:
    tokenizer = header.metadata.get("tokenizer.ggml.model")
    if tokenizer not in TOKENIZERS:
        said = "has no tokenizer" if tokenizer is None else f"has a tokenizer of kind {shown(str(tokenizer))}"
        raise unusable(header.path, f"it {said}; emlocal needs one of {', '.join(sorted(TOKENIZERS))}")
    template = header.chat_template or ""
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
    """Elements of the array tokenizer.ggml.NAME, of one of the types; None if there is no such key."""
    key = f"tokenizer.ggml.{name}"
    value = header.metadata.get(key)
    if value is None:
        return None
    if isinstance(value, ArrayRef) and value.element_type in element_types:
        return value.length
    # A short array of numbers is already decoded. One of the wrong width llama.cpp refuses with an error.
    if isinstance(value, tuple) and types.STRING not in element_types:
        return len(value)
    wanted = " or ".join(types.VALUE_TYPE_NAMES[t] for t in element_types)
    raise unusable(header.path, f"{key} is not an array of {wanted}")


def _check_special_ids(header: GGUFHeader, tokenizer: str, count: int) -> None:
    """A token added to every text must be one of the vocabulary: llama-vocab.cpp:3443 asserts it.

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
    """Tokens must differ (llama-vocab.cpp:2544 asserts), and byte tokens must be what they are parsed as.

    `data`: the bytes of the header. Of a header that passed `check_language_model`, this looks at no others.
    """
    tokenizer = header.metadata["tokenizer.ggml.model"]
    tokens = header.byte_strings("tokenizer.ggml.tokens", data)
    known = set(tokens)
    if b"" in known or b"\0" in b"".join(tokens):  # C strings there, and names for the empty ones
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
