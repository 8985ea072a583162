"""What a GGUF header says, in the words of a Hugging Face model folder: config.json, generation_config.json,
and which tensor becomes which.

The names are those of transformers' Llama, Qwen2 and Qwen3 models; the rules for the tensors are those of
llama.cpp's convert_hf_to_gguf.py, backwards.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from emlocal.errors import ModelError
from emlocal.models.gguf.header import GGUFHeader, TensorInfo, shown
from emlocal.models.vocabulary import Vocabulary

RUN_AS_IT_IS = "llama.cpp runs it as it is: --backend llama.cpp; to train or merge it give its safetensors"
"""What to do with a GGUF model that cannot be unpacked."""

Json = dict[str, Any]

# GGUF architecture -> (class, model_type).
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
# Metadata that change what a model computes, which the classes above know nothing of.
_FOREIGN = (
    *("expert_count", "attention.scale", "attention.clamp_kqv", "logit_scale", "embedding_scale"),
    *("residual_scale", "rope.scaling.alpha", "rope.scaling.yarn_log_multiplier"),
)
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = ("attn_q_norm", "attn_k_norm")  # Qwen3's alone
_BLOCK = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>\w+)\.(?P<what>weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"
_SAMPLING_NAMES = {"penalty_repeat": "repetition_penalty"}  # general.sampling.* -> generation_config.json
_SAMPLING_KEPT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Unpacked(NamedTuple):
    """A tensor of the GGUF file and what becomes of it."""

    name: str
    """In the folder."""
    source: TensorInfo
    dtype: Literal["F32", "F16", "BF16"]
    heads: int
    """Attention heads whose rows llama.cpp has in another order; 0 where the order is the same."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major: [rows, columns]."""
        return self.source.shape[::-1]


def check_architecture(header: GGUFHeader) -> None:
    """Raise ModelError for a model that cannot be unpacked."""
    if header.architecture not in ARCHITECTURES:
        known = _listed(ARCHITECTURES)
        raise _cannot(header, f"its architecture is {shown(header.architecture)}; {known} can be unpacked")
    for name in _FOREIGN:
        if header.value(name):
            raise _cannot(header, f"{header.architecture}.{name} is {shown(str(header.value(name)))}")
    if len(set(header.head_count)) > 1 or len(set(header.head_count_kv)) > 1:
        raise _cannot(header, "its layers differ in their attention heads")
    if len(set(header.per_layer("feed_forward_length"))) != 1:
        raise _cannot(header, "its layers differ in their width")


def tensors(header: GGUFHeader) -> list[Unpacked]:
    """All tensors as they are to be written, those of four bytes first so that each is aligned.

    Raises ModelError if one is missing or has no place in the folder.
    """
    found = [_unpacked(header, t) for t in header.tensors.values() if t.name != _ROPE_FACTORS]
    have = {t.name for t in found}
    layers = [f"model.layers.{n}" for n in range(header.block_count)]
    needed = {part for part in _PARTS if header.architecture == "qwen3" or part not in _HEAD_NORMS}
    want = {f"{layer}.{_PARTS[part]}.weight" for layer in layers for part in needed}
    lost = sorted((want | {"model.embed_tokens.weight", "model.norm.weight"}) - have)
    if lost:
        raise _cannot(header, f"{len(lost)} of its tensors are missing, such as {lost[0]}")
    return sorted(found, key=lambda t: t.dtype != "F32")


def _unpacked(header: GGUFHeader, tensor: TensorInfo) -> Unpacked:
    match = _BLOCK.fullmatch(tensor.name)
    part = match["part"] if match else ""
    name = _TOP.get(tensor.name)
    known = part in _PARTS and (header.architecture == "qwen3" or part not in _HEAD_NORMS)
    if match and known and int(match["layer"]) < header.block_count:
        name = f"model.layers.{int(match['layer'])}.{_PARTS[part]}.{match['what']}"
    if name is None:
        raise _cannot(header, f"emlocal does not know its tensor {shown(tensor.name)}")
    heads = 0
    if header.architecture == "llama" and part in ("attn_q", "attn_k"):
        heads = (header.head_count if part == "attn_q" else header.head_count_kv)[0]
    if tensor.type in ("F32", "F16", "BF16"):
        return Unpacked(name, tensor, tensor.type, heads)  # type: ignore[arg-type]  # just compared
    return Unpacked(name, tensor, "F32" if len(tensor.shape) == 1 else "F16", heads)


def model_config(
    header: GGUFHeader, vocabulary: Vocabulary, plan: list[Unpacked], factors: list[float]
) -> Json:
    """config.json. `factors` are the values of rope_freqs.weight, if the model has it."""
    name, model_type = ARCHITECTURES[header.architecture]
    have = {t.name for t in plan}
    heads = header.head_count[0]
    config: Json = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": header.vocab_size,
        "hidden_size": header.embedding_length,
        "intermediate_size": header.per_layer("feed_forward_length")[0],
        "num_hidden_layers": header.block_count,
        "num_attention_heads": heads,
        "num_key_value_heads": header.head_count_kv[0],
        "head_dim": header.integer("attention.key_length") or header.embedding_length // heads,
        "hidden_act": "silu",
        "max_position_embeddings": header.context_length,
        "rms_norm_eps": _float(header, "attention.layer_norm_rms_epsilon"),
        **_rope(header, factors),
        "attention_dropout": 0.0,
        "tie_word_embeddings": "lm_head.weight" not in have,
        "use_cache": True,
        "dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[_common_dtype(plan)],
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.padding,
    }
    if model_type != "qwen2":  # Qwen2 always has biases for q, k and v
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in have
    if model_type == "llama":
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in have
    else:
        config["use_sliding_window"] = False  # llama.cpp knows none for these
    _check_biases(header, have, config)
    return config


def _check_biases(header: GGUFHeader, have: set[str], config: Json) -> None:
    """The classes have all biases of a kind or none, in every layer."""
    qkv = config["model_type"] == "qwen2" or config["attention_bias"]
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] if qkv else []
    kinds += ["self_attn.o_proj"] if qkv and config["model_type"] != "qwen2" else []
    kinds += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if config.get("mlp_bias") else []
    want = {f"model.layers.{n}.{kind}.bias" for n in range(header.block_count) for kind in kinds}
    odd = sorted({t for t in have if t.endswith(".bias")} ^ want)
    if odd:
        there = "is" if odd[0] in have else "is not"
        raise _cannot(header, f"{odd[0]} {there} there, which no {config['architectures'][0]} can have")


def _common_dtype(plan: list[Unpacked]) -> str:
    """What the matrices are, by their bytes."""
    sizes = dict.fromkeys(("F16", "BF16", "F32"), 0)
    for tensor in plan:
        if len(tensor.shape) > 1:
            sizes[tensor.dtype] += tensor.source.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _rope(header: GGUFHeader, factors: list[float]) -> Json:
    """`rope_theta`, and `rope_scaling` where positions are scaled."""
    theta = _float(header, "rope.freq_base", 10000.0)
    kind = str(header.value("rope.scaling.type") or "linear")
    factor = _float(header, "rope.scaling.factor", 0.0) or _float(header, "rope.scale_linear", 0.0) or 1.0
    original = header.integer("rope.scaling.original_context_length") or header.context_length
    scaling: Json = {"rope_type": "default"}
    if header.value("rope.scaling.attn_factor") not in (None, 1.0):
        raise _cannot(header, f"rope.scaling.attn_factor is {header.value('rope.scaling.attn_factor')}")
    if factors:
        if kind != "none" and factor != 1.0:
            raise _cannot(header, f"it has rope_freqs.weight and {shown(kind)} scaling by {factor:g}")
        scaling = _llama3_scaling(header, theta, factors)
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif kind == "linear" and factor != 1.0:
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind not in ("none", "linear"):
        raise _cannot(header, f"its rope.scaling.type is {shown(kind)}")
    # rope_parameters is transformers 5's, rope_theta and rope_scaling are transformers 4's and mlx-lm's
    old = {} if scaling["rope_type"] == "default" else {"rope_scaling": scaling}
    return {"rope_theta": theta, **old, "rope_parameters": {"rope_theta": theta, **scaling}}


def _llama3_scaling(header: GGUFHeader, theta: float, factors: list[float]) -> Json:
    """Llama 3's scaling, of which the file has the result only: the frequencies' divisors.

    Every model of that kind has low and high factors of 1 and 4 and was first trained on 8,192 tokens; the
    factor itself is the largest divisor. What this makes is compared with the file.
    """
    from math import pi

    half = len(factors)
    factor, low, high, original = max(factors), 1.0, 4.0, 8192
    for number, said in enumerate(factors):
        wavelength = 2 * pi * theta ** (number / half)
        smooth = (original / wavelength - low) / (high - low)
        blend = min(max(smooth, 0.0), 1.0)
        divisor = 1 / ((1 - blend) / factor + blend)
        if abs(divisor - said) > 1e-4 * divisor:
            at = f"rope_freqs.weight[{number}]"
            raise _cannot(header, f"its {at} is {said:g}, by Llama 3's rule {divisor:g}")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def generation_config(header: GGUFHeader, vocabulary: Vocabulary) -> Json:
    """generation_config.json: every token that ends a generation, and the authors' sampling settings."""
    said = {_SAMPLING_NAMES.get(k, k): v for k, v in header.sampling.items()}
    config: Json = {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": sorted(vocabulary.end_tokens),
        "pad_token_id": vocabulary.padding,
    }
    kept: Mapping[str, float] = {k: said[k] for k in _SAMPLING_KEPT if k in said}
    return config | ({"do_sample": True, **kept} if kept else {})


def tokenizer_config(header: GGUFHeader, vocabulary: Vocabulary) -> Json:
    """tokenizer_config.json."""
    names = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "pad_token": vocabulary.padding,
        "unk_token": vocabulary.unknown,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": header.context_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        **{name: None if number is None else vocabulary.texts[number] for name, number in names.items()},
    }


def _float(header: GGUFHeader, name: str, default: float | None = None) -> float:
    value = header.value(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if default is None:
        raise _cannot(header, f"it does not say its {header.architecture}.{name}")
    return default


def _cannot(header: GGUFHeader, why: str) -> ModelError:
    return ModelError(f"{header.path.name} cannot be unpacked: {why}", hint=RUN_AS_IT_IS)


def _listed(names: Mapping[str, object]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"
