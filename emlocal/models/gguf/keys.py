"""Checks of an architecture's keys that llama.cpp reads: types, ranges, and keys that must fit together.

llama.cpp answers a wrong type with an error, but many contradictory numbers with an assertion that ends the
process, or with a loop that never ends. Each check names the fault that it guards against. The line numbers
are of the llama.cpp vendored in llama-cpp-python 0.3.36; files are in src/ unless another folder is named.
For the architectures in `CHECKED`, the tables here have every key that llama.cpp reads. The test
tests/attack/test_gguf.py changes every key that the library knows, one at a time, and loads the result.
"""

from collections.abc import Mapping
from itertools import zip_longest
from math import inf, isfinite, isinf, isnan
from typing import Literal, NamedTuple

from emlocal.models.gguf import types
from emlocal.models.gguf.header import ArrayRef, GGUFHeader, Value, int_or_none, shown, unusable

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS; llama-model.cpp:1328 asserts it
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS; llama-model.cpp:1361
MAX_EMBEDDING = 1 << 20
MAX_CONTEXT = (1 << 31) - 1  # positions are int32
MAX_WINDOW = 1 << 24  # times sequences it must stay below 2^32; llama-kv-cache-iswa.cpp multiplies them

# Architectures without attention heads, for which a head count of 0 is correct.
RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
# Architectures whose graphs assert key size = value size = rotated size (models/*.cpp: n_embd_head == n_rot).
UNIFORM_HEADS = frozenset(
    "llama llama4 qwen2 qwen2moe qwen3 qwen3moe smollm3 mistral3 granite olmo olmo2 olmoe "  # noqa: SIM905
    "exaone starcoder2 internlm2 baichuan orion xverse deci ernie4_5 apertus".split()
)
# Architectures whose graphs reshape values with the size of keys.
SAME_KEYS_AND_VALUES = UNIFORM_HEADS | {"gemma", "gemma2", "gemma3", "phi3"}
WINDOWED = frozenset({"gemma2", "gemma3"})
ROPE_SCALINGS = frozenset({"none", "linear", "yarn", "longrope"})


class Rule(NamedTuple):
    """The values that a key may have. `low` and `high` are for whole numbers."""

    kind: Literal["number", "numbers", "real", "flag", "text", "pattern"]
    """ "numbers": one, or one per layer. "pattern": one, or an array of flags or numbers."""
    low: int = 0
    high: int = (1 << 32) - 1


_SIZE = Rule("number", 1, MAX_EMBEDDING)
_COUNT = Rule("number", 0, MAX_EMBEDDING)
_LENGTH = Rule("number", 0, MAX_CONTEXT)
_REAL, _FLAG, _TEXT = Rule("real"), Rule("flag"), Rule("text")

_OF_ALL: Mapping[str, Rule] = {
    "attention.causal": _FLAG,
    "attention.head_count": Rule("numbers", 1, MAX_EMBEDDING),
    "attention.head_count_kv": Rule("numbers", 1, MAX_EMBEDDING),
    "attention.key_length": _SIZE,
    "attention.key_length_swa": _SIZE,
    "attention.layer_norm_rms_epsilon": _REAL,
    "attention.value_length": _SIZE,
    "attention.value_length_swa": _SIZE,
    "block_count": Rule("number", 1, MAX_LAYERS),
    "classifier.pooling_type": Rule("number"),
    "context_length": Rule("number", 1, MAX_CONTEXT),
    "embedding_length": _SIZE,
    "embedding_length_out": _COUNT,
    "expert_count": Rule("number", 0, MAX_EXPERTS),
    "expert_group_count": Rule("number", 0, MAX_EXPERTS),
    "expert_group_used_count": Rule("number", 0, MAX_EXPERTS),
    "expert_used_count": Rule("numbers", 0, MAX_EXPERTS),
    "feed_forward_length": Rule("numbers", 0, 1 << 24),
    "nextn_predict_layers": Rule("number", 0, MAX_LAYERS),
    "pooling_type": Rule("number"),
    "rope.dimension_count": _SIZE,
    "rope.dimension_count_swa": _SIZE,
    "rope.freq_base": _REAL,
    "rope.scale_linear": _REAL,
    "rope.scaling.alpha": _REAL,
    "rope.scaling.attn_factor": _REAL,
    "rope.scaling.factor": _REAL,
    "rope.scaling.finetuned": _FLAG,
    "rope.scaling.original_context_length": _LENGTH,
    "rope.scaling.type": _TEXT,
    "vocab_size": _LENGTH,
}
_OF_WINDOWED: Mapping[str, Rule] = {
    "attention.sliding_window": Rule("number", 0, MAX_WINDOW),
    "attention.sliding_window_pattern": Rule("pattern"),
    "rope.freq_base_swa": _REAL,
    "final_logit_softcapping": _REAL,
}
CHECKED: Mapping[str, Mapping[str, Rule]] = {
    "llama": _OF_ALL,
    "qwen2": _OF_ALL,
    "qwen3": _OF_ALL,
    "qwen3moe": {**_OF_ALL, "expert_feed_forward_length": Rule("numbers", 0, 1 << 24)},
    "gemma": _OF_ALL,
    "gemma2": {**_OF_ALL, **_OF_WINDOWED, "attn_logit_softcapping": _REAL},
    "gemma3": {**_OF_ALL, **_OF_WINDOWED},
    "phi3": {**_OF_ALL, "attention.sliding_window": _LENGTH},
    "deepseek2": {
        **_OF_ALL,
        "attention.key_length_mla": _COUNT,
        "attention.kv_lora_rank": _SIZE,
        "attention.q_lora_rank": _COUNT,
        "attention.temperature_length": _LENGTH,
        "attention.temperature_scale": _REAL,
        "attention.value_length_mla": _COUNT,
        "expert_feed_forward_length": Rule("numbers", 0, 1 << 24),
        "expert_gating_func": Rule("number", 0, 4),  # llama-graph.cpp:2072 aborts
        "expert_shared_count": Rule("number", 0, MAX_EXPERTS),
        "expert_weights_norm": _FLAG,
        "expert_weights_scale": _REAL,
        "leading_dense_block_count": Rule("number", 0, MAX_LAYERS),
        "rope.scaling.yarn_log_multiplier": _REAL,
    },
}
"""The architectures whose keys are all known here."""


def check_keys(header: GGUFHeader) -> None:
    """Raises ModelError, in one line with the numbers, for values that llama.cpp cannot be trusted with."""
    _check_types(header)
    _check_sizes(header)
    _check_heads(header)
    _check_experts(header)
    _check_floats(header)
    if header.architecture in WINDOWED:
        _check_windows(header)
    if header.architecture == "deepseek2":
        _check_latent_attention(header)


def _check_types(header: GGUFHeader) -> None:
    """Checks that each key of a checked architecture has the type and the range that llama.cpp reads."""
    for name, rule in CHECKED.get(header.architecture, {}).items():
        value = header.value(name)
        if value is None:
            continue
        key = f"{header.architecture}.{name}"
        if not _fits(rule, value, header.value_types[key]):
            raise unusable(header.path, f"{key} is {_told(value)}, not {_wanted(rule)}")


def _fits(rule: Rule, value: Value, type_: int) -> bool:
    if rule.kind == "real":
        return type_ == types.FLOAT32 and isinstance(value, float) and isfinite(value)
    if rule.kind == "flag":
        return type_ == types.BOOL
    if rule.kind == "text":
        return type_ == types.STRING
    if type_ == types.UINT32:
        return isinstance(value, int) and rule.low <= value <= rule.high
    if rule.kind == "number" or not isinstance(value, tuple):
        return False
    return all(isinstance(n, int) and rule.low <= n <= rule.high for n in value)


def _wanted(rule: Rule) -> str:
    return {
        "real": "a finite number of type float32",
        "flag": "a boolean",
        "text": "a text",
        "number": f"a number of type uint32 in {rule.low:,} to {rule.high:,}",
        "numbers": f"one number or one a layer, in {rule.low:,} to {rule.high:,}",
        "pattern": "one number or an array of them",
    }[rule.kind]


def _told(value: Value) -> str:
    if isinstance(value, ArrayRef):
        return f"an array of {value.length:,}"
    if isinstance(value, tuple) and len(value) > 8:
        return f"an array of {len(value):,} that begins with {', '.join(shown(str(v)) for v in value[:4])}"
    return shown(str(value)) or '""'


def in_range(header: GGUFHeader, name: str, low: int, high: int, *, required: bool = False) -> int | None:
    """Returns the architecture's own whole number `name`; None if it is absent and not required.

    Raises ModelError for another kind of value, or one out of bounds.
    """
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
    layers = in_range(header, "block_count", 1, MAX_LAYERS, required=True) or 0
    in_range(header, "nextn_predict_layers", 0, layers - 1)
    in_range(header, "context_length", 1, MAX_CONTEXT, required=True)
    embedding = in_range(header, "embedding_length", 1, MAX_EMBEDDING, required=True)
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
    """Checks that query heads are a multiple of key heads, and that rotated sizes are even and fit.

    ggml asserts these. A rotated size of 0 makes its kernel run for ever (ggml-cpu/ops.cpp:6355). The graphs
    of the checked architectures take the first layer's heads for all, and the cache takes each layer's own.
    """
    architecture, embedding = header.architecture, header.embedding_length
    heads, heads_kv = header.head_count, header.head_count_kv
    if architecture not in RECURRENT and not any(heads):
        raise unusable(header.path, "attention.head_count is 0")
    for layer, (q, kv) in enumerate(zip_longest(heads, heads_kv, fillvalue=0)):
        if not 0 <= q <= embedding or not 0 <= kv <= q or (kv and q % kv):
            raise unusable(header.path, f"layer {layer} has {q:,} attention heads for {kv:,} key-value heads")
        if architecture in CHECKED and (q, kv) != (heads[0], heads_kv[0]):
            raise unusable(
                header.path,
                f"layer {layer} has {q:,} attention heads for {kv:,} key-value heads, the first layer"
                f" {heads[0]:,} for {heads_kv[0]:,}; {architecture} models have the same in all",
            )
    if architecture in RECURRENT:
        return
    head_size = embedding // (heads[0] or max(heads))
    keys = in_range(header, "attention.key_length", 1, MAX_EMBEDDING) or head_size
    values = in_range(header, "attention.value_length", 1, MAX_EMBEDDING) or head_size
    rotated = in_range(header, "rope.dimension_count", 2, keys)
    if (keys if rotated is None else rotated) % 2 and architecture != "gpt2":
        raise unusable(header.path, f"rope.dimension_count is {rotated or keys}, an odd number")
    most = max(keys, header.integer("attention.key_length_swa") or 0)
    swa = in_range(header, "rope.dimension_count_swa", 2, most) or 0
    if swa % 2:
        raise unusable(header.path, f"rope.dimension_count_swa is {swa}, an odd number")
    said = f"attention heads have keys of {keys}, values of {values} and rotate {rotated or keys}"
    one_size = keys == values == (rotated or keys)
    if (architecture in UNIFORM_HEADS and not one_size) or (
        architecture in SAME_KEYS_AND_VALUES and keys != values
    ):
        raise unusable(header.path, f"{said}; {architecture} models need one size")
    # models/phi3.cpp views its fused Q, K, V in this way
    if architecture == "phi3" and keys * heads[0] != embedding:
        raise unusable(header.path, f"{said}; {heads[0]} heads of {keys} do not make {embedding:,}")


def _check_windows(header: GGUFHeader) -> None:
    """Checks the layers with a window.

    They have keys of their own, which these graphs make as large as all others. llama-model.cpp:2807 asserts
    that a model with a window has a layer with one.
    """
    sizes = {"attention.key_length": header.key_length, "attention.value_length": header.value_length}
    for name, size in sizes.items():
        own = header.integer(f"{name}_swa")
        if own not in (None, size):
            raise unusable(header.path, f"{name}_swa is {own}, but heads without a window have {size}")
    if header.architecture == "gemma3" and not header.integer("attention.sliding_window"):
        return
    pattern = header.value("attention.sliding_window_pattern")
    some = any(pattern[: header.block_count]) if isinstance(pattern, tuple) else pattern != 1
    if not some or (isinstance(pattern, tuple) and len(pattern) > MAX_LAYERS):
        told = _told(1 if pattern is None else pattern)
        raise unusable(header.path, f"attention.sliding_window_pattern is {told}: no layer has a window")


def _check_latent_attention(header: GGUFHeader) -> None:
    """Checks deepseek2: with compressed keys and values the cache has the ranks' sizes, else whole heads.

    models/deepseek2.cpp asserts that a part of a head is not rotated; llama-kv-cache.cpp:1343 asserts that
    the graph's keys are as large as the cache's.
    """
    keys, values = header.key_length, header.value_length
    rotated = header.integer("rope.dimension_count") or keys
    own = header.integer("attention.key_length_mla"), header.integer("attention.value_length_mla")
    compressed = bool(own[0] and own[1])
    head = own[0] if own[0] and compressed else keys
    if rotated >= head:
        raise unusable(header.path, f"of {head} numbers of a head's key all {rotated} are rotated")
    rank = in_range(header, "attention.kv_lora_rank", 1, MAX_EMBEDDING, required=True) or 0
    heads, heads_kv = header.head_count[0], header.head_count_kv[0]
    want = (1, rank + rotated, rank) if compressed else (heads, keys, values)
    if (heads_kv, keys, values) != want:
        raise unusable(
            header.path,
            f"its cache holds {heads_kv:,} × keys of {keys:,} and values of {values:,}; its ranks and heads"
            f" make {want[0]:,} × {want[1]:,} and {want[2]:,}",
        )
    scale, length = (header.value(f"attention.temperature_{name}") for name in ("scale", "length"))
    if scale and not length:  # llama-graph.cpp:162 asserts it
        raise unusable(header.path, f"attention.temperature_length is {length}, with a temperature_scale")


def _check_experts(header: GGUFHeader) -> None:
    """Checks the numbers of experts, which llama-model.cpp:1361-1374 asserts.

    The graphs take the first layer's number for all layers.
    """
    count = in_range(header, "expert_count", 0, MAX_EXPERTS) or 0
    used = header.per_layer("expert_used_count") or (0,)
    groups = in_range(header, "expert_group_count", 0, MAX_EXPERTS) or 0
    groups_used = in_range(header, "expert_group_used_count", 0, MAX_EXPERTS) or 0
    whole = count == 0 and max(used) == 0 and groups == 0
    least = max(used) if header.architecture in CHECKED else 0
    routed = 0 < max(used) <= count and min(used) >= least and groups < count
    grouped = groups <= 1 or (count % groups == 0 and 0 < groups_used < groups)
    if not (whole or (routed and grouped)):
        raise unusable(
            header.path,
            f"of its {count:,} experts {max(used):,} are used, in {groups_used:,} of {groups:,} groups",
        )


def _check_floats(header: GGUFHeader) -> None:
    """Checks floating-point numbers.

    A negative or infinite epsilon fails an assertion in the norms; NaN anywhere makes NaN logits.
    """
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
