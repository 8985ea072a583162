"""The facts of a GGUF header in the form of a Hugging Face model folder.

They are config.json, generation_config.json, tokenizer_config.json, and the plan of which tensor becomes
which. The names are those of transformers' models; see architectures.py.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from emlocal.models.gguf.header import GGUFHeader, TensorInfo, shown
from emlocal.models.unpacked.architectures import ARCHITECTURES
from emlocal.models.unpacked.classes import SCALES, of_its_class
from emlocal.models.unpacked.facts import Json, cannot, head_size, number
from emlocal.models.vocabulary import Vocabulary

# Metadata that change what a model computes, and that most classes do not know.
_FOREIGN = (
    *("expert_count", "attention.clamp_kqv", "rope.scaling.alpha", "rope.scaling.yarn_log_multiplier"),
    *("attention.scale", "logit_scale", "embedding_scale", "residual_scale"),
)
_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"
_BLOCK = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>[\w.]+)\.(?P<what>weight|bias)")
LONG_FACTORS = "rope_factors_long.weight"
ROPE_FACTORS = {
    "rope_freqs.weight": "llama3",
    "rope_factors_short.weight": "short",
    LONG_FACTORS: "long",
}
"""Vectors that stretch positions; they become part of config.json."""
_SAMPLING_NAMES = {"penalty_repeat": "repetition_penalty"}  # general.sampling.* -> generation_config.json
_SAMPLING_KEPT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Unpacked(NamedTuple):
    """A tensor of the GGUF file and its form in the folder."""

    name: str
    """Name in the folder."""
    source: TensorInfo
    dtype: Literal["F32", "F16", "BF16"]
    heads: int = 0
    """Attention heads whose rows llama.cpp reorders; 0 if the order is the same."""
    less: float = 0.0
    """The number that is subtracted from every value."""
    deepened: bool = False
    """Whether the folder has an axis of length 1 after the first one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major: [rows, columns]."""
        rows, *others = self.source.shape[::-1]
        return (rows, 1, *others) if self.deepened else (rows, *others)


def check_architecture(header: GGUFHeader) -> None:
    """Raises ModelError for a model that cannot be unpacked."""
    if header.architecture not in ARCHITECTURES:
        known = _listed(ARCHITECTURES)
        raise cannot(header, f"its architecture is {shown(header.architecture)}; {known} can be unpacked")
    known_class = ARCHITECTURES[header.architecture]
    for name in _FOREIGN:
        if header.value(name) and not (known_class.scales and name in SCALES):
            raise cannot(header, f"{header.architecture}.{name} is {shown(str(header.value(name)))}")
    heads = set(header.head_count_kv) - ({0} if known_class.other_parts else set())
    if len(set(header.head_count)) > 1 or len(heads) != 1:
        raise cannot(header, "its layers differ in their attention heads")
    if len(set(header.per_layer("feed_forward_length"))) != 1:
        raise cannot(header, "its layers differ in their width")
    rotated = header.integer("rope.dimension_count") or head_size(header)
    if rotated != head_size(header) and not known_class.rotates_part:
        raise cannot(header, f"it rotates {rotated} of the {head_size(header)} numbers of a head")
    if header.value("rope.scaling.finetuned") is False and known_class.scales:
        raise cannot(header, "it does not rotate positions")


def runs_as_attention(header: GGUFHeader) -> bool:
    """Returns whether all layers of an unpacked model are attention, as the engines need it."""
    return 0 not in header.head_count_kv


def tensors(header: GGUFHeader) -> list[Unpacked]:
    """Returns all tensors as they are to be written, those of four bytes first so that each is aligned.

    Raises ModelError if one is missing or has no place in the folder.
    """
    found = [_unpacked(header, t) for t in header.tensors.values() if t.name not in ROPE_FACTORS]
    have, known = {t.name for t in found}, ARCHITECTURES[header.architecture]
    want = {
        f"model.layers.{layer}.{name}.weight"
        for layer, heads in enumerate(header.head_count_kv)
        for name in known.parts_of(heads > 0).values()
    }
    lost = sorted((want | {"model.embed_tokens.weight", f"{known.last_norm[1]}.weight"}) - have)
    if lost:
        raise cannot(header, f"{len(lost)} of its tensors are missing, such as {lost[0]}")
    return sorted(found, key=lambda t: t.dtype != "F32")


def _unpacked(header: GGUFHeader, tensor: TensorInfo) -> Unpacked:
    known = ARCHITECTURES[header.architecture]
    match = _BLOCK.fullmatch(tensor.name)
    part, layer = (match["part"], int(match["layer"])) if match else ("", 0)
    top = {
        _EMBEDDING: "model.embed_tokens",
        _OUTPUT: "lm_head",
        f"{known.last_norm[0]}.weight": known.last_norm[1],
    }
    name = f"{top[tensor.name]}.weight" if tensor.name in top else None
    if match and layer < header.block_count:
        parts = known.parts_of(header.head_count_kv[layer] > 0)
        name = f"model.layers.{layer}.{parts[part]}.{match['what']}" if part in parts else None
    if name is None:
        raise cannot(header, f"emlocal does not know its tensor {shown(tensor.name)}")
    heads = 0
    if known.reordered and part in ("attn_q", "attn_k"):
        heads = (header.head_count if part == "attn_q" else header.head_count_kv)[0]
    if known.norms_plus_one and name.endswith("norm.weight"):
        return Unpacked(name, tensor, "F32", less=1.0)
    deep = part == "shortconv.conv"
    if tensor.type in ("F32", "F16", "BF16"):
        return Unpacked(name, tensor, tensor.type, heads, deepened=deep)  # type: ignore[arg-type]  # just compared
    return Unpacked(name, tensor, "F32" if len(tensor.shape) == 1 else "F16", heads, deepened=deep)


def model_config(
    header: GGUFHeader, vocabulary: Vocabulary, plan: list[Unpacked], factors: Mapping[str, list[float]]
) -> Json:
    """Returns config.json. `factors`: the values of the tensors in ROPE_FACTORS, by name."""
    known = ARCHITECTURES[header.architecture]
    have = {t.name for t in plan}
    config: Json = {
        "architectures": [known.name],
        "model_type": known.model_type,
        "vocab_size": header.vocab_size,
        "hidden_size": header.embedding_length,
        "intermediate_size": header.per_layer("feed_forward_length")[0],
        "num_hidden_layers": header.block_count,
        "num_attention_heads": header.head_count[0],
        "num_key_value_heads": max(header.head_count_kv),
        "head_dim": head_size(header),
        **({known.activation[0]: known.activation[1]} if known.activation else {}),
        "max_position_embeddings": header.context_length,
        "rms_norm_eps": number(header, "attention.layer_norm_rms_epsilon"),
        **_rope(header, factors.get("llama3", [])),
        "attention_dropout": 0.0,
        "tie_word_embeddings": "lm_head.weight" not in have,
        "use_cache": True,
        "dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[_common_dtype(plan)],
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "pad_token_id": vocabulary.padding,
    }
    config |= of_its_class(header, config, factors)
    if "attention" in known.biases:
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in have
    if "mlp" in known.biases:
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in have
    _check_biases(header, have, config)
    return config


def _check_biases(header: GGUFHeader, have: set[str], config: Json) -> None:
    """Checks that all layers have the same biases: the classes have all of a kind or none."""
    always = ARCHITECTURES[header.architecture].always_biased
    qkv = always or config.get("attention_bias")
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] if qkv else []
    kinds += ["self_attn.o_proj"] if qkv and not always else []
    kinds += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if config.get("mlp_bias") else []
    want = {f"model.layers.{n}.{kind}.bias" for n in range(header.block_count) for kind in kinds}
    odd = sorted({t for t in have if t.endswith(".bias")} ^ want)
    if odd:
        there = "is" if odd[0] in have else "is not"
        raise cannot(header, f"{odd[0]} {there} there, which no {config['architectures'][0]} can have")


def _common_dtype(plan: list[Unpacked]) -> str:
    """Returns the type of most bytes of the matrices."""
    sizes = dict.fromkeys(("F16", "BF16", "F32"), 0)
    for tensor in plan:
        if len(tensor.shape) > 1:
            sizes[tensor.dtype] += tensor.source.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _rope(header: GGUFHeader, factors: list[float]) -> Json:
    """Returns `rope_theta`, and `rope_scaling` if positions are scaled."""
    theta = number(header, "rope.freq_base", 10000.0)
    kind = str(header.value("rope.scaling.type") or "linear")
    factor = number(header, "rope.scaling.factor", 0.0) or number(header, "rope.scale_linear", 0.0) or 1.0
    original = header.integer("rope.scaling.original_context_length") or header.context_length
    scaling: Json = {"rope_type": "default"}
    if header.architecture != "phi3" and header.value("rope.scaling.attn_factor") not in (None, 1.0):
        raise cannot(header, f"rope.scaling.attn_factor is {header.value('rope.scaling.attn_factor')}")
    if factors:
        if kind != "none" and factor != 1.0:
            raise cannot(header, f"it has rope_freqs.weight and {shown(kind)} scaling by {factor:g}")
        scaling = _llama3_scaling(header, theta, factors)
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif kind == "linear" and factor != 1.0:
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind not in ("none", "linear"):
        raise cannot(header, f"its rope.scaling.type is {shown(kind)}")
    # rope_parameters is transformers 5's, rope_theta and rope_scaling are transformers 4's and mlx-lm's
    old = {} if scaling["rope_type"] == "default" else {"rope_scaling": scaling}
    return {"rope_theta": theta, **old, "rope_parameters": {"rope_theta": theta, **scaling}}


def _llama3_scaling(header: GGUFHeader, theta: float, factors: list[float]) -> Json:
    """Returns Llama 3's scaling, of which the file has the result only: the frequencies' divisors.

    Every model of that kind has low and high factors of 1 and 4 and was first trained on 8,192 tokens; the
    factor itself is the largest divisor. The result is compared with the file.
    """
    from math import pi

    half = len(factors)
    factor, low, high, original = max(factors), 1.0, 4.0, 8192
    for at, said in enumerate(factors):
        wavelength = 2 * pi * theta ** (at / half)
        smooth = (original / wavelength - low) / (high - low)
        blend = min(max(smooth, 0.0), 1.0)
        divisor = 1 / ((1 - blend) / factor + blend)
        if abs(divisor - said) > 1e-4 * divisor:
            raise cannot(header, f"its rope_freqs.weight[{at}] is {said:g}, by Llama 3's rule {divisor:g}")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def generation_config(header: GGUFHeader, vocabulary: Vocabulary) -> Json:
    """Returns generation_config.json: the tokens that end a generation, and the authors' settings."""
    said = {_SAMPLING_NAMES.get(k, k): v for k, v in header.sampling.items()}
    config: Json = {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": sorted(vocabulary.end_tokens),
        "pad_token_id": vocabulary.padding,
    }
    kept: Mapping[str, float] = {k: said[k] for k in _SAMPLING_KEPT if k in said}
    return config | ({"do_sample": True, **kept} if kept else {})


def tokenizer_config(header: GGUFHeader, vocabulary: Vocabulary) -> Json:
    """Returns tokenizer_config.json."""
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
        **{name: None if token is None else vocabulary.texts[token] for name, token in names.items()},
    }


def _listed(names: Mapping[str, object]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"
