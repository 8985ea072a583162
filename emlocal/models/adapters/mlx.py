"""MLX's folder: adapter_config.json and adapters.safetensors, as mlx-lm writes and loads them.

Keys are layer + `.lora_a` [in, rank] or `.lora_b` [rank, out]; y += scale · (x A) B, with one rank and one
scale for all layers (`lora_parameters`). Source: mlx_lm/tuner/lora.py and utils.py of mlx-lm 0.32.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emlocal.errors import ModelError
from emlocal.models.adapters.adapter import Adapter, LoraPair
from emlocal.models.adapters.checks import checked_pair, unusable
from emlocal.models.adapters.folder import CONFIG, halves, read_config, unsupported, write_folder
from emlocal.models.gguf.header import shown
from emlocal.models.safetensors import read_floats, read_safetensors_header

WEIGHTS = "adapters.safetensors"
_SUFFIXES = (".lora_a", ".lora_b")
_LAYER = re.compile(r"model\.layers\.\d+\.(.+)")


def read_mlx(folder: Path) -> Adapter:
    """Read an MLX folder.

    Raises ModelError for what is missing, broken, or another kind of fine-tuning (DoRA, full, LoRA on
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
    header = read_safetensors_header(folder / WEIGHTS)
    pairs = {}
    for name, (a_name, b_name) in halves(header, "", _SUFFIXES, {}).items():
        if name.endswith("embed_tokens"):
            raise unsupported(where, f"LoRA on embeddings ({shown(name)})")
        a, b = read_floats(header, a_name), read_floats(header, b_name)
        pairs[name] = checked_pair(where, name, a.T.copy(), b.T.copy(), scale)
    base = config.get("model")
    return Adapter(pairs, base if isinstance(base, str) else "")


def write_mlx(adapter: Adapter, folder: Path, *, replace: bool = False) -> None:
    """Write an MLX folder, float32, whole or not at all.

    MLX has one rank and one scale for all layers. The highest rank and the commonest scale are used: lower
    ranks are filled up with zeros, other scales are multiplied into B.

    Raises UsageError or EmlocalError where the folder exists (`replace`: is no adapter) or cannot be
    written, ModelError for scales so far apart that B overflows.
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
        "num_layers": -1,  # all; a layer without tensors in the file is left as it is
        "lora_parameters": {"rank": rank, "scale": common, "dropout": 0.0, "keys": sorted(keys)},
    }
    write_folder(folder, config, WEIGHTS, tensors, replace)


def folded(name: str, pair: LoraPair, scale: float) -> NDArray[np.float32]:
    """B for a file that says `scale` (not 0) where this layer's own is another. Raises ModelError."""
    if pair.scale == scale:
        return pair.b
    with np.errstate(over="ignore"):
        b = (pair.b.astype(np.float64) * (pair.scale / scale)).astype(np.float32)
    if not np.isfinite(b).all():
        raise ModelError(
            f"the scale of {name}, {pair.scale:g}, cannot be written beside the commonest, {scale:g}",
            "write the adapter as a PEFT folder",
        )
    return b
