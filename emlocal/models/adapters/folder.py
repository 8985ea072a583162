"""What PEFT's and MLX's folders have in common: a configuration in JSON, and pairs in a safetensors file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emlocal.errors import ModelError, UsageError
from emlocal.files import atomic_folder, read_regular
from emlocal.models.adapters.adapter import unusable
from emlocal.models.gguf.header import shown
from emlocal.models.safetensors import SafetensorsHeader, write_safetensors

CONFIG = "adapter_config.json"
_MAX_CONFIG_BYTES = 10_000_000
_OURS = {CONFIG, "adapter_model.safetensors", "adapters.safetensors", "README.md"}


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`. Raises ModelError where it is missing, huge or no table."""
    path = folder / CONFIG
    try:
        config = json.loads(read_regular(path, _MAX_CONFIG_BYTES))
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror}", "an adapter is a folder with both"
        ) from error
    except (ValueError, RecursionError):
        raise unusable(str(folder), f"{CONFIG} is not JSON") from None
    if not isinstance(config, dict):
        raise unusable(str(folder), f"{CONFIG} is not a table")
    return config


def halves(
    header: SafetensorsHeader, prefix: str, suffixes: tuple[str, str], known: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """The tensors (A, B) of each layer, which are called `prefix` + layer + one of the `suffixes`.

    `known` explains, by a part of their names, tensors of kinds that emlocal does not support.
    Raises ModelError for those, for other names, for a half without the other, and where there is none.
    """
    where = header.path.parent.name
    layers: dict[str, dict[str, str]] = {}
    for part, why in known.items():
        name = next((n for n in header.tensors if part in n), None)
        if name is not None:
            raise unsupported(where, f"{why} ({shown(name)})")
    for name in header.tensors:
        suffix = next((s for s in suffixes if name.endswith(s)), None)
        if suffix is None or not name.startswith(prefix):
            raise unusable(where, f"it has a tensor {shown(name)}, which is no half of a LoRA pair")
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
    """For adapters that are sound, but of a kind that emlocal does not compute."""
    return ModelError(
        f"{where} uses {what}, which emlocal does not support", "train or export it as plain LoRA"
    )


def write_folder(
    folder: Path, config: Mapping[str, Any], file: str, tensors: dict[str, NDArray[np.float32]], replace: bool
) -> None:
    """Write both files at once: whoever looks sees the whole adapter or none.

    Raises UsageError where `replace` would remove anything but an adapter, EmlocalError where nothing can
    be written.
    """
    if replace and folder.is_dir():
        foreign = sorted(p.name for p in folder.iterdir() if p.name not in _OURS)
        if foreign:
            raise UsageError(
                f"{folder} has more in it than an adapter ({shown(foreign[0])}) and is not replaced",
                "choose another name, or remove the folder first",
            )
    with atomic_folder(folder, replace=replace) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        floats = {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
        write_safetensors(temporary / file, floats, {"format": "pt"})
