"""The values of config.json that only some of transformers' classes have.

What llama.cpp computes is in src/models/*.cpp of llama-cpp-python 0.3.36.
"""

from collections.abc import Mapping

from emlocal.models.gguf.header import GGUFHeader
from emlocal.models.unpacked.facts import Json, cannot, head_size, number

# Granite's numbers, by the names in the metadata and in config.json
SCALES = {
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
}
_GEMMA_PERIOD = 6  # every sixth layer of Gemma 3 sees everything
_LAYERS_OF_27B = 62  # Gemma 3 27B is the only size that scales attention by its embedding


def of_its_class(header: GGUFHeader, config: Json, factors: Mapping[str, list[float]]) -> Json:
    """Returns what the architecture's class takes besides the common values in `config`.

    `factors`: see `model_config`. Raises ModelError for values that the class cannot express.
    """
    particular = _OF_CLASS.get(header.architecture)
    return particular(header, config, factors) if particular else {}


def _no_window(header: GGUFHeader, config: Json, factors: Mapping[str, list[float]]) -> Json:
    return {"use_sliding_window": False}  # llama.cpp has no sliding window for Qwen


def _smollm3(header: GGUFHeader, config: Json, factors: Mapping[str, list[float]]) -> Json:
    rotated = [int((layer + 1) % 4 != 0) for layer in range(header.block_count)]
    return {"use_sliding_window": False, "no_rope_layer_interval": 4, "no_rope_layers": rotated}


def _granite(header: GGUFHeader, config: Json, factors: Mapping[str, list[float]]) -> Json:
    default = {"attention.scale": head_size(header) ** -0.5}  # as llama.cpp if a file has none, or 0
    return {name: number(header, key, 0.0) or default.get(key, 1.0) for key, name in SCALES.items()}


def _phi3(header: GGUFHeader, config: Json, factors: Mapping[str, list[float]]) -> Json:
    """Returns the part of each head that is rotated, and how Phi stretches positions.

    llama.cpp switched Phi's sliding window off (its pull request 13676), so it is off here, too.
    """
    size = head_size(header)
    part = (header.integer("rope.dimension_count") or size) / size
    rope: Json = {**config["rope_parameters"], "partial_rotary_factor": part}
    original = header.integer("rope.scaling.original_context_length") or header.context_length
    stretch = number(header, "rope.scaling.attn_factor", 1.0)
    if factors.keys() & {"short", "long"}:
        if not factors.keys() >= {"short", "long"}:
            raise cannot(header, "it has one of rope_factors_short and rope_factors_long without the other")
        rope |= {
            "rope_type": "longrope",
            "short_factor": factors["short"],
            "long_factor": factors["long"],
            "attention_factor": stretch,
            "original_max_position_embeddings": original,
        }
    elif stretch != 1.0:
        raise cannot(header, f"rope.scaling.attn_factor is {stretch:g}")
    found: Json = {"rope_parameters": rope, "partial_rotary_factor": part, "sliding_window": None}
    found["original_max_position_embeddings"] = original
    return found | ({"rope_scaling": rope} if rope["rope_type"] == "longrope" else {})


def _gemma3(header: GGUFHeader, config: Json, factors: Mapping[str, list[float]]) -> Json:
    """Returns windows, the two kinds of positions, and what Gemma scales."""
    everything = config["rope_parameters"]
    if everything["rope_type"] not in ("default", "linear"):
        raise cannot(header, f"it has {everything['rope_type']} scaling")
    window = header.integer("attention.sliding_window") or None
    period = _period(header) if window else 1
    local = number(header, "rope.freq_base_swa", 10000.0)
    wide = header.embedding_length // header.head_count[0]
    return {
        "sliding_window": window or header.context_length,  # transformers wants one, even if unused
        "layer_types": [
            "sliding_attention" if slides else "full_attention"
            for slides in _slides(header.block_count, period)
        ],
        "sliding_window_pattern": period,  # mlx-lm's name
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": everything,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
        "query_pre_attn_scalar": wide if header.block_count == _LAYERS_OF_27B else head_size(header),
        "final_logit_softcapping": number(header, "final_logit_softcapping", 0.0) or None,
        "attn_logit_softcapping": None,
        "attention_bias": False,
    }


def _slides(layers: int, period: int) -> list[bool]:
    """Returns which layers have a sliding window: all but each one at the end of a period."""
    return [(layer + 1) % period != 0 for layer in range(layers)]


def _period(header: GGUFHeader) -> int:
    """Returns after how many layers one sees everything."""
    said = header.value("attention.sliding_window_pattern")
    if said is None:
        return _GEMMA_PERIOD
    if isinstance(said, int) and said > 0:
        return said
    told = [bool(slides) for slides in header.per_layer("attention.sliding_window_pattern")]
    layers = header.block_count
    for period in range(1, layers + 2):
        if _slides(layers, period) == told:
            return period
    raise cannot(header, "its sliding windows follow no period")


def _lfm2(header: GGUFHeader, config: Json, factors: Mapping[str, list[float]]) -> Json:
    kinds = ["full_attention" if heads else "conv" for heads in header.head_count_kv]
    if header.integer("attention.sliding_window"):
        raise cannot(header, "it has a sliding window")
    return {
        "layer_types": kinds,
        "full_attn_idxs": [n for n, kind in enumerate(kinds) if kind == "full_attention"],  # mlx-lm's name
        "conv_L_cache": header.integer("shortconv.l_cache"),
        "conv_bias": False,
        "norm_eps": config["rms_norm_eps"],
        "block_auto_adjust_ff_dim": False,
        "block_dim": header.embedding_length,  # this and the next ones are mlx-lm's names
        "block_ff_dim": config["intermediate_size"],
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
    }


_OF_CLASS = {
    "qwen2": _no_window,
    "qwen3": _no_window,
    "smollm3": _smollm3,
    "granite": _granite,
    "phi3": _phi3,
    "gemma3": _gemma3,
    "lfm2": _lfm2,
}
