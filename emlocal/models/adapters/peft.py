"""PEFT's folder: adapter_config.json and adapter_model.safetensors. emlocal's own form of an adapter on disk.

Keys are `base_model.model.` + layer + `.lora_A.weight` [rank, in] or `.lora_B.weight` [out, rank], and a
layer's scale is alpha / rank, with `use_rslora` alpha / √rank. Source: peft/tuners/lora of peft 0.21.
"""

import re
from collections import Counter
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

from emlocal.errors import ModelError
from emlocal.models.adapters.adapter import Adapter, LoraPair, checked_pair, unusable
from emlocal.models.adapters.folder import CONFIG, halves, read_config, unsupported, write_folder
from emlocal.models.gguf.header import shown
from emlocal.models.safetensors import read_floats, read_safetensors_header

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")

_UNSUPPORTED_TENSORS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA on embeddings",
    "modules_to_save": "modules_to_save (whole layers beside LoRA)",
    "lora_B.bias": "biases on LoRA layers",
    ".base_layer.": "weights of the model itself beside LoRA (save_embedding_layers)",
}
_UNSUPPORTED = {
    "modules_to_save": "modules_to_save (whole layers beside LoRA)",
    "lora_bias": "biases on LoRA layers",
    "fan_in_fan_out": "transposed layers (fan_in_fan_out)",
    "layer_replication": "layer_replication",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_dora": "DoRA",
}
"""Fields of the configuration that change what is computed, wherever they are set."""
_VARIANT = re.compile(r"use_(?!rslora$)\w+|(monteclora|velora|arrow|kasa)_config")
"""Fields of variants that peft 0.21 has or a later one may have."""
_CHANGES_BASE = re.compile(r"pissa.*|olora|loftq|corda|lora_ga|mica")
"""`init_lora_weights` that change the base model's weights too, or make it no plain LoRA."""


def read_peft(folder: Path) -> Adapter:
    """Read a PEFT folder.

    Raises ModelError for what is missing, broken, or other than plain LoRA on linear layers.
    """
    where = folder.name
    config = read_config(folder)
    _check_kind(where, config)
    rank, alpha = _number(where, config, "r", 8), _number(where, config, "lora_alpha", 8)
    ranks, alphas = _pattern(where, config, "rank_pattern"), _pattern(where, config, "alpha_pattern")
    rooted = bool(config.get("use_rslora"))
    header = read_safetensors_header(folder / WEIGHTS)
    pairs = {}
    for name, (a_name, b_name) in halves(header, _PREFIX, _SUFFIXES, _UNSUPPORTED_TENSORS).items():
        a, b = read_floats(header, a_name), read_floats(header, b_name)
        r, this_alpha = _matching(ranks, name, rank), _matching(alphas, name, alpha)
        if a.ndim != 2 or a.shape[0] != r:
            raise unusable(where, f"A of {shown(name)} is {list(a.shape)}, but {CONFIG} says rank {r:g}")
        scale = this_alpha / (sqrt(r) if rooted else r) if r else this_alpha
        pairs[name] = checked_pair(where, name, a, b, scale)
    base = config.get("base_model_name_or_path")
    return Adapter(pairs, base if isinstance(base, str) else "")


def write_peft(adapter: Adapter, folder: Path, *, replace: bool = False) -> None:
    """Write a PEFT folder, float32, whole or not at all.

    The commonest rank and alpha are the folder's own, others are listed by layer. rsLoRA's scales are
    written as the plain alphas that they amount to, so that readers without rsLoRA understand them.

    Raises UsageError or EmlocalError where the folder exists (`replace`: is no adapter) or cannot be written.
    """
    ranks = {name: pair.rank for name, pair in adapter.pairs.items()}
    alphas = {name: _plain(pair.scale * pair.rank) for name, pair in adapter.pairs.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": _targets(adapter.pairs),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    tensors = {}
    for name, pair in adapter.pairs.items():
        tensors[f"{_PREFIX}{name}{_SUFFIXES[0]}"] = pair.a
        tensors[f"{_PREFIX}{name}{_SUFFIXES[1]}"] = pair.b
    write_folder(folder, config, WEIGHTS, tensors, replace)


def _check_kind(where: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind is None:
        raise unusable(where, f"{CONFIG} does not say its peft_type")
    if kind != "LORA":
        raise unsupported(where, f"the method {shown(str(kind))}")
    if config.get("bias", "none") != "none":
        raise unsupported(where, f"trained biases (bias is {shown(str(config['bias']))})")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.fullmatch(start):
        raise unsupported(where, f"init_lora_weights = {shown(start)}, for a base model with changed weights")
    for field, value in config.items():
        if value and (field in _UNSUPPORTED or _VARIANT.fullmatch(field)):
            raise unsupported(where, _UNSUPPORTED.get(field, shown(field)))


def _number(where: str, table: Mapping[str, Any], key: str, default: float = 0) -> float:
    value = table.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise unusable(where, f"{shown(key)} in {CONFIG} is {shown(str(value))}, not a number")
    return value


def _pattern(where: str, config: Mapping[str, Any], field: str) -> list[tuple[re.Pattern[str], float]]:
    """`rank_pattern` or `alpha_pattern`: regular expressions on the ends of layers' names, and numbers."""
    table = config.get(field) or {}
    if not isinstance(table, dict) or len(table) > 10_000:
        raise unusable(where, f"{field} in {CONFIG} is no table of numbers by layer")
    return [(_compiled(where, field, key), _number(where, table, key)) for key in table]


def _compiled(where: str, field: str, key: str) -> re.Pattern[str]:
    """A pattern out of a file, as PEFT applies it (utils.get_pattern_key), if it can be matched at once.

    A stranger's regular expression can take forever: nothing repeats a group here, few things repeat at all.
    """
    tame = re.fullmatch(r"[\w.^$|()\\\[\]*+-]{1,200}", key, re.ASCII)
    if tame and not re.search(r"\)[*+]|\\\d", key) and len(re.findall(r"[*+]", key)) <= 2:
        try:
            return re.compile(rf"(.*\.)?({key})$")
        except re.error:
            pass  # said below, like the others
    raise unusable(where, f"{field} in {CONFIG} has the pattern {shown(key)}, which is not understood")


def _matching(patterns: list[tuple[re.Pattern[str], float]], name: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(name)), default)


def _plain(number: float) -> float:
    """A whole number as an int, and 8.000000000000002 (rank times alpha / rank) as 8."""
    rounded = round(number, 9)
    return int(rounded) if rounded == int(rounded) else number


def _commonest(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


def _targets(pairs: Mapping[str, LoraPair]) -> list[str]:
    """`target_modules`: kinds of layers where every layer from 0 on has the same ones, else each by name.

    Both mean the same to PEFT; others, such as vLLM, only know kinds.
    """
    kinds: dict[str, set[str]] = {}
    for name in pairs:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            return sorted(pairs)
        kinds.setdefault(match[1], set()).add(match[2])
    same = len({frozenset(k) for k in kinds.values()}) == 1
    if same and kinds.keys() == {str(i) for i in range(len(kinds))}:
        return sorted({kind.rpartition(".")[2] for kind in kinds["0"]})
    return sorted(pairs)


def check_no_pickle(folder: Path) -> None:
    """Raise ModelError for folders whose weights are only there as a pickle, which would run as code."""
    for name in ("adapter_model.bin", "adapter_model.pt", "adapters.npz"):
        if (folder / name).exists():
            raise ModelError(
                f"the weights of {folder} are in {name}; emlocal reads only safetensors, for pickles can"
                " run code",
                "save the adapter again with safe_serialization=True (PEFT) or a current mlx-lm",
            )
