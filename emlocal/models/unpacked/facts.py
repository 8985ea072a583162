"""Helpers for unpacking: numbers of a GGUF header, and the error for a model that cannot be unpacked."""

from typing import Any

from emlocal.errors import ModelError
from emlocal.models.gguf.header import GGUFHeader

RUN_AS_IT_IS = "run it with --backend llama.cpp; to train or merge it use its safetensors"
"""What to do with a GGUF model that cannot be unpacked."""

Json = dict[str, Any]


def head_size(header: GGUFHeader) -> int:
    """Returns the numbers in a head."""
    return header.integer("attention.key_length") or header.embedding_length // header.head_count[0]


def number(header: GGUFHeader, name: str, default: float | None = None) -> float:
    """Returns a number of the metadata. Raises ModelError if it is not there and has no default."""
    value = header.value(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if default is None:
        raise cannot(header, f"it does not say its {header.architecture}.{name}")
    return default


def cannot(header: GGUFHeader, why: str) -> ModelError:
    """Returns the error for a model that cannot be unpacked."""
    return ModelError(f"{header.path.name} cannot be unpacked: {why}", hint=RUN_AS_IT_IS)
