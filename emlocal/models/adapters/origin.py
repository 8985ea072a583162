"""A check whether an adapter is used with another model than the one it names as its base.

Only names can be compared: an adapter of another model of the same shape loads, and produces nonsense. The
same model has many names (a short one, its repositories in three formats, a file's), so a difference leads to
a warning, not to a refusal.
"""

import re
from pathlib import Path

from emlocal.models.adapters import format_of
from emlocal.models.adapters.folders import read_config
from emlocal.models.adapters.gguf_lora import BASE_NAME
from emlocal.models.gguf import read_adapter_pairs
from emlocal.models.gguf.header import shown
from emlocal.models.header import ModelHeader
from emlocal.models.resolve import catalog

_ENDING = re.compile(r"[-_.: ](gguf|mlx|unsloth|bnb|gptq|awq|\d+bit|u?d|i?q\d\w*|b?f16|fp16|f32)$")
"""Endings that say how a model is stored, not which one it is."""


def base_of(path: Path) -> str:
    """Returns the base model that the adapter names; "" if it names none. Raises ModelError."""
    if format_of(path) == "gguf":
        base = read_adapter_pairs(path)[0].metadata.get(BASE_NAME)
    else:
        config = read_config(path)
        base = config.get("base_model_name_or_path") or config.get("model")
    return base if isinstance(base, str) else ""


def other_base(path: Path, model: str, header: ModelHeader | None) -> str | None:
    """Returns a warning if the adapter names another base model; None if not, or if it names none.

    `model` is the model's name, `header` its file's header, if one was read. Raises ModelError for an adapter
    that cannot be read.
    """
    base = base_of(path)
    known = (model,) if header is None else (model, header.name, header.path.name, header.path.parent.name)
    if not base or _names(base) & _names(*known):
        return None
    return f"{path} names {shown(base)} as its base model, but this is {model}"


def _names(*told: str) -> set[str]:
    """Returns models' names as letters and digits alone, each with the catalog's other names for it.

    A short name stays as it is: "qwen2.5:0.5b" is the instruct model, Qwen2.5-0.5B is not.
    """
    short = {name.lower() for name in told} & catalog().keys()
    found = {_plain(name) for name in told if name.lower() not in short}
    for entry in catalog().values():
        others = {_plain(name) for name in (entry.gguf, entry.mlx, entry.safetensors)}
        if entry.alias in short or others & found:
            found |= {entry.alias, *others}
    return found - {""}


def _plain(name: str) -> str:
    """Returns a name's plain form: "org/SmolLM2-135M-Instruct-GGUF:Q4_K_M" → "smollm2135minstruct"."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().removesuffix(".gguf")
    while (shorter := _ENDING.sub("", last)) != last:
        last = shorter
    return re.sub(r"[^a-z0-9]", "", last)
