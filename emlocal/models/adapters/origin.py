"""Whether an adapter is used with another model than the one it says that it was trained on.

Names are all there is to compare: an adapter of another model of the same shape fits, and makes it babble.
The same model has many names (a short one, its repositories in three formats, a file's), so a difference is
worth a word, not a refusal.
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
"""What says how a model is stored, not which one it is."""


def base_of(path: Path) -> str:
    """What the adapter says that it was trained on; "" where it says nothing. Raises ModelError."""
    if format_of(path) == "gguf":
        base = read_adapter_pairs(path)[0].metadata.get(BASE_NAME)
    else:
        config = read_config(path)
        base = config.get("base_model_name_or_path") or config.get("model")
    return base if isinstance(base, str) else ""


def other_base(path: Path, model: str, header: ModelHeader | None) -> str | None:
    """In words, that the adapter is of a model of another name; None where it is not, or does not tell.

    `model` is what the model is called, `header` what its file says, where one was read. Raises ModelError
    for an adapter that cannot be read.
    """
    base = base_of(path)
    known = (model,) if header is None else (model, header.name, header.path.name, header.path.parent.name)
    if not base or _names(base) & _names(*known):
        return None
    return f"{path} says that it was trained on {shown(base)}, and this is {model}; are they the same?"


def _names(*told: str) -> set[str]:
    """Names of models as letters and digits alone, each with the others that the catalog has for it.

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
    """ "org/SmolLM2-135M-Instruct-GGUF:Q4_K_M" → "smollm2135minstruct"."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().removesuffix(".gguf")
    while (shorter := _ENDING.sub("", last)) != last:
        last = shorter
    return re.sub(r"[^a-z0-9]", "", last)
