"""Adapters as folders, PEFT's and MLX's: a configuration in JSON, and pairs in a safetensors file.

PEFT's format, adapter_config.json and adapter_model.safetensors, is emlocal's own form of an adapter on disk.
Keys are `base_model.model.` + layer + `.lora_A.weight` [rank, in] or `.lora_B.weight` [out, rank]. A layer's
scale is alpha / rank, with `use_rslora` alpha / √rank. Source: peft/tuners/lora of peft 0.21.

MLX's format, adapter_config.json and adapters.safetensors, is as mlx-lm writes and loads it. Keys are layer +
`.lora_a` [in, rank] or `.lora_b` [rank, out]; y += scale · (x A) B, with one rank and one scale for all
layers (`lora_parameters`). Source: mlx_lm/tuner/lora.py and utils.py of mlx-lm 0.32.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emlocal.errors import ModelError, UsageError
from emlocal.files import atomic_folder, read_regular
from emlocal.models.adapters.adapter import Adapter, LoraPair, checked_pair, folded, unusable
from emlocal.models.gguf.header import shown
from emlocal.models.safetensors import (
    SafetensorsHeader,
    read_floats,
    read_safetensors_header,
    write_safetensors,
)

CONFIG = "adapter_config.json"
_MAX_CONFIG_BYTES = 10_000_000
_SAVED_WHOLE = ("embed_tokens.", "lm_head.", "modules_to_save.")
"""Parts of names of layers that are saved whole, without LoRA."""
_OURS = {CONFIG, "adapter_model.safetensors", "adapters.safetensors", "README.md"}


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the table in `adapter_config.json`. Raises ModelError if it is missing, huge or not a table."""
    path = folder / CONFIG
    try:
        config = json.loads(read_regular(path, _MAX_CONFIG_BYTES))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", "name a folder with both files") from error
    except (ValueError, RecursionError):
        raise unusable(str(folder), f"{CONFIG} is not JSON") from None
    if not isinstance(config, dict):
        raise unusable(str(folder), f"{CONFIG} is not a table")
    return config


def halves(
    header: SafetensorsHeader, prefix: str, suffixes: tuple[str, str], known: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Returns the tensors (A, B) of each layer. Their names are `prefix` + layer + one of the `suffixes`.

    `known` explains unsupported kinds of tensors, by a part of their names. Raises ModelError for those, for
    other names, for a half without the other, and for a file without tensors.
    """
    where = header.path.parent.name
    layers: dict[str, dict[str, str]] = {}
    for part, why in known.items():
        name = next((n for n in header.tensors if part in n), None)
        if name is not None:
            raise unsupported(where, f"{why} ({shown(name)})")
    for name in header.tensors:
        suffix = next((s for s in suffixes if name.endswith(s)), None)
        if suffix is None and any(part in name for part in _SAVED_WHOLE):
            raise unusable(
                where,
                f"it has the model's own {shown(name)} beside LoRA"
                " (PEFT saves it when the vocabulary was resized)",
                "save it again with save_pretrained(…, save_embedding_layers=False)",
            )
        if suffix is None or not name.startswith(prefix):
            raise unusable(where, f"it has a tensor {shown(name)}, which is not half of a LoRA pair")
        layers.setdefault(name[len(prefix) : -len(suffix)], {})[suffix] = name
    for layer, found in layers.items():
        if len(found) < 2:
            there = next(iter(found))
            missing = suffixes[1] if there == suffixes[0] else suffixes[0]
            raise unusable(where, f"{shown(layer)} has a {there[1:]} and no {missing[1:]}")
    if not layers:
        raise unusable(where, f"{header.path.name} has no tensors")
    return {layer: (found[suffixes[0]], found[suffixes[1]]) for layer, found in layers.items()}


def unsupported(where: str, what: str) -> ModelError:
    """Returns the error for adapters that are sound, but of a kind that emlocal does not compute."""
    return ModelError(
        f"{where} uses {what}, which emlocal does not support", "train it again or export it as plain LoRA"
    )


def write_folder(
    folder: Path, config: Mapping[str, Any], file: str, tensors: dict[str, NDArray[np.float32]], replace: bool
) -> None:
    """Writes both files at once: a reader sees the whole adapter or none.

    Raises UsageError if `replace` would remove anything but an adapter, EmlocalError if nothing can be
    written.
    """
    if replace and folder.is_dir():
        foreign = sorted(p.name for p in folder.iterdir() if p.name not in _OURS)
        if foreign:
            raise UsageError(
                f"{folder} has other files than an adapter's ({shown(foreign[0])}), so --force does"
                " not replace it",
                "choose another name, or remove the folder first",
            )
    with atomic_folder(folder, replace=replace) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        floats = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
        write_safetensors(temporary / file, floats, {"format": "pt"})


MLX_WEIGHTS = "adapters.safetensors"
_MLX_SUFFIXES = (".lora_a", ".lora_b")
_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")


def read_mlx(folder: Path) -> Adapter:
    """Reads an MLX folder.

    Raises ModelError for missing or broken files, and for another kind of fine-tuning (DoRA, full, LoRA on
    embeddings or experts).
    """
    where = folder.name
    config = read_config(folder)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise unsupported(where, "DoRA" if kind == "dora" else f"fine_tune_type = {shown(str(kind))}")
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise unusable(where, f"{CONFIG} has no number lora_parameters.scale")
    header = read_safetensors_header(folder / MLX_WEIGHTS)
    pairs = {}
    for name, (a_name, b_name) in halves(header, "", _MLX_SUFFIXES, {}).items():
        if name.endswith("embed_tokens"):
            raise unsupported(where, f"LoRA on embeddings ({shown(name)})")
        a, b = read_floats(header, a_name), read_floats(header, b_name)
        pairs[name] = checked_pair(where, name, a.T.copy(), b.T.copy(), scale)
    base = config.get("model")
    return Adapter(pairs, base if isinstance(base, str) else "")


def write_mlx(adapter: Adapter, folder: Path, *, replace: bool = False) -> None:
    """Writes an MLX folder, float32, whole or not at all.

    MLX has one rank and one scale for all layers. The highest rank and the commonest scale are used: lower
    ranks are padded with zeros, other scales are multiplied into B.

    Raises UsageError or EmlocalError if the folder exists (with `replace`: if it is not an adapter) or cannot
    be written, ModelError for scales so far apart that B overflows.
    """
    rank = max(pair.rank for pair in adapter.pairs.values())
    scale = Counter(pair.scale for pair in adapter.pairs.values() if pair.scale).most_common(1)
    common = scale[0][0] if scale else 1.0
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, pair in adapter.pairs.items():
        b = folded(name, pair, common)
        missing = rank - pair.rank
        tensors[f"{name}.lora_a"] = np.pad(pair.a, ((0, missing), (0, 0))).T
        tensors[f"{name}.lora_b"] = np.pad(b, ((0, 0), (0, missing))).T
    keys = {match[1] if (match := _LAYER.fullmatch(name)) else name for name in adapter.pairs}
    config = {
        **({"model": adapter.base_model} if adapter.base_model else {}),
        "fine_tune_type": "lora",
        "num_layers": -1,  # all; a layer without tensors in the file stays unchanged
        "lora_parameters": {"rank": rank, "scale": common, "dropout": 0.0, "keys": sorted(keys)},
    }
    write_folder(folder, config, MLX_WEIGHTS, tensors, replace)


PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_PEFT_SUFFIXES = (".lora_A.weight", ".lora_B.weight")

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
"""Fields of the configuration that change the computation, wherever they are set."""
_VARIANT = re.compile(r"use_(?!rslora$)\w+|(monteclora|velora|arrow|kasa)_config")
"""Fields of variants that peft 0.21 has or a later version may have."""
_CHANGES_BASE = re.compile(r"pissa.*|olora|loftq|corda|lora_ga|mica")
"""Values of `init_lora_weights` that change the base model's weights too, or are not plain LoRA."""


def read_peft(folder: Path) -> Adapter:
    """Reads a PEFT folder.

    Raises ModelError for missing or broken files, and for anything but plain LoRA on linear layers.
    """
    where = folder.name
    config = read_config(folder)
    _check_kind(where, config)
    rank, alpha = _number(where, config, "r", 8), _number(where, config, "lora_alpha", 8)
    ranks, alphas = _pattern(where, config, "rank_pattern"), _pattern(where, config, "alpha_pattern")
    rooted = bool(config.get("use_rslora"))
    header = read_safetensors_header(folder / PEFT_WEIGHTS)
    pairs = {}
    for name, (a_name, b_name) in halves(header, _PEFT_PREFIX, _PEFT_SUFFIXES, _UNSUPPORTED_TENSORS).items():
        a, b = read_floats(header, a_name), read_floats(header, b_name)
        r, this_alpha = _matching(ranks, name, rank), _matching(alphas, name, alpha)
        if a.ndim != 2 or a.shape[0] != r:
            raise unusable(where, f"A of {shown(name)} is {list(a.shape)}, but {CONFIG} says rank {r:g}")
        scale = this_alpha / (sqrt(r) if rooted else r) if r else this_alpha
        pairs[name] = checked_pair(where, name, a, b, scale)
    base = config.get("base_model_name_or_path")
    return Adapter(pairs, base if isinstance(base, str) else "")


def write_peft(adapter: Adapter, folder: Path, *, replace: bool = False) -> None:
    """Writes a PEFT folder, float32, whole or not at all.

    The commonest rank and alpha become the folder's own; others are listed by layer. rsLoRA's scales are
    written as the equal plain alphas, so that readers without rsLoRA understand them.

    Raises UsageError or EmlocalError if the folder exists (with `replace`: if it is not an adapter) or cannot
    be written.
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
        tensors[f"{_PEFT_PREFIX}{name}{_PEFT_SUFFIXES[0]}"] = pair.a
        tensors[f"{_PEFT_PREFIX}{name}{_PEFT_SUFFIXES[1]}"] = pair.b
    write_folder(folder, config, PEFT_WEIGHTS, tensors, replace)


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
    """Returns the numbers of `rank_pattern` or `alpha_pattern`, with patterns of layers' last names."""
    table = config.get(field) or {}
    if not isinstance(table, dict) or len(table) > 10_000:
        raise unusable(where, f"{field} in {CONFIG} is not a table of numbers by layer")
    return [(_compiled(where, field, key), _number(where, table, key)) for key in table]


def _compiled(where: str, field: str, key: str) -> re.Pattern[str]:
    """Returns a pattern from a file, as PEFT applies it (utils.get_pattern_key), if it is quick to match.

    An untrusted regular expression can take forever: here no group may repeat, and at most two things may.
    """
    tame = re.fullmatch(r"[\w.^$|()\\\[\]*+-]{1,200}", key, re.ASCII)
    if tame and not re.search(r"\)[*+]|\\\d", key) and len(re.findall(r"[*+]", key)) <= 2:
        try:
            return re.compile(rf"(.*\.)?({key})$")
        except re.error:
            pass  # said below, like the others
    raise unusable(where, f"{field} in {CONFIG} has the pattern {shown(key)}, which is not a valid pattern")


def _matching(patterns: list[tuple[re.Pattern[str], float]], name: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(name)), default)


def _plain(number: float) -> float:
    """Returns a whole number as an int, and 8.000000000000002 (rank times alpha / rank) as 8."""
    rounded = round(number, 9)
    return int(rounded) if rounded == int(rounded) else number


def _commonest(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


def _targets(pairs: Mapping[str, LoraPair]) -> list[str]:
    """Returns `target_modules`: kinds of layers if every layer from 0 on has the same, otherwise all names.

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
    """Raises ModelError for folders whose weights exist only as a pickle, which would run as code."""
    for name in ("adapter_model.bin", "adapter_model.pt", "adapters.npz"):
        if (folder / name).exists():
            raise ModelError(
                f"the weights of {folder} are in {name}; emlocal reads only safetensors, because pickles can"
                " run code",
                "save the adapter again with safe_serialization=True (PEFT) or a current mlx-lm",
            )
